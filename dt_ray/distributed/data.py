"""Datasets on Ray Data: checked episodes, and windows for other trainers, read and packed in parallel."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import ray
import ray.data

from dt_ray.config.schema import DataConfig, RunConfig
from dt_ray.data.description.clocks import FileClock, read_clock
from dt_ray.data.formats import has_rows, is_flat
from dt_ray.data.logs.episodes import from_table, to_table
from dt_ray.data.logs.files import DatasetFile, RowRange, find_files
from dt_ray.data.logs.looks import FileShape, look_into, read_shape_of
from dt_ray.data.logs.outline import outline_rows
from dt_ray.data.logs.plan import FileEpisodes
from dt_ray.data.logs.reading import EpisodeReader, fault_in_file, warn_of
from dt_ray.data.logs.row_ranges import find_ranges
from dt_ray.data.logs.sources import read_episode_ids, sound_files
from dt_ray.data.spaces import SpaceSpec, read_spaces
from dt_ray.data.transitions import chosen_episodes, held_out_episodes
from dt_ray.data.windows import slice_windows
from dt_ray.distributed.cluster import user_errors
from dt_ray.distributed.functions import blocks_of_function
from dt_ray.distributed.usage import saying_when_full
from dt_ray.errors import ConfigError
from dt_ray.learners import return_source_of

MAX_PARTITIONS = 16
WINDOWS_PER_BLOCK = 4096
MAX_LOOKED_AT = 2**26  # bytes; smaller logs are looked through first, to log warnings that tasks can't log


def episode_dataset(
    config: DataConfig, spec: SpaceSpec | None, *, files: Sequence[DatasetFile] | None = None
) -> ray.data.Dataset:
    """The checked episodes of a dataset's sound files, or of `files`: a row each, as `logs.episodes` writes them.

    Flat transitions are cut into fragments file by file; where files share episodes, their fragments meet by a shuffle.

    Raises:
        DataError: there is no file, or files of both kinds; faults inside a file are raised when it is read.
    """
    with user_errors():
        files = sound_files_on_ray(config, spec)[0] if files is None else files
        reader = EpisodeReader.of(
            files,
            config,
            spec,
            look=lambda files: ray.get([_look_into.remote(file, config) for file in files]),
            shape_of=lambda file: ray.get(_shape_of.remote(file, config)),
            ranges_of=lambda files: ray.get([_ranges_of.remote(file, config) for file in files]),
        )

    joiner = replace(reader, files=())

    def join(fragments: pa.Table) -> pa.Table:
        return to_table(joiner.join(fragments)) if len(fragments) else fragments

    dataset = _fragments_of(reader)
    if reader.joins:
        dataset.context.target_max_block_size = None  # a partition cut into blocks could cut an episode
        dataset = dataset.repartition(min(len(reader.files), MAX_PARTITIONS), keys=["episode_id"])
        dataset = dataset.map_batches(join, batch_format="pyarrow", batch_size=None)
    return dataset


def _fragments_of(reader: EpisodeReader) -> ray.data.Dataset:
    """The episodes of each file, or its fragments of them, in the order of the files."""

    def read(units: pa.Table) -> Iterator[pa.Table]:
        for index in units["index"].to_pylist():
            yield _read(reader, index)

    num_files = len(reader.files)
    if reader.files[0].block is not None:  # Ray would keep the rows for ever as a part of `read`, but not of a task
        tables: list[Any] = [_read_file.remote(reader.for_file(index)) for index in range(num_files)]
        dataset = ray.data.from_arrow_refs(tables)
    else:
        units = [{"index": index} for index in range(num_files)]
        dataset = ray.data.from_items(units, override_num_blocks=min(num_files, 4 * MAX_PARTITIONS))
    dataset.context.enable_progress_bars = False
    dataset.context.execution_options.preserve_order = True
    is_read = reader.files[0].block is not None
    return dataset if is_read else dataset.map_batches(read, batch_format="pyarrow", batch_size=None)


def episode_tables(config: DataConfig, spec: SpaceSpec | None) -> Iterator[pa.Table]:
    """The checked episodes of a dataset, block by block: the driver holds one at a time."""
    with user_errors(), saying_when_full("data tasks"):
        for block in episode_dataset(config, spec).iter_batches(batch_size=None, batch_format="pyarrow"):
            if len(block):
                yield block


def outline_tables(config: RunConfig) -> Iterator[pa.Table]:
    """The rows of a dataset's outline, block by block."""

    def outline(table: pa.Table) -> pa.Table:
        if not len(table):
            return table
        return outline_rows(from_table(table, source=", ".join(config.data.paths)), config, return_source_of(config))

    with user_errors(), saying_when_full("data tasks"):
        rows = episode_dataset(config.data, None).map_batches(outline, batch_format="pyarrow", batch_size=None)
        yield from (block for block in rows.iter_batches(batch_size=None, batch_format="pyarrow") if len(block))


def read_clocks(files: Sequence[DatasetFile], config: DataConfig) -> list[FileClock | None]:
    """`read_clock` of each file, by a task each."""
    with user_errors(), saying_when_full("data tasks"):
        return ray.get([_read_clock.remote(file, config) for file in files])


def window_dataset(config: RunConfig, *, split: Literal["train", "validation"] = "train") -> ray.data.Dataset:
    """A plain Ray Dataset of windows for other trainers: one row for each transition of the split, in its order.

    The columns are those of `dt_ray.data.Windows`, tensors of `model.context_length` steps in the units of the data.

    Raises:
        ConfigError: `data.return_source=value`, which needs all episodes at once.
    """
    settings = config.data
    spec = None if config.env_id is None else read_spaces(config.env_id, config.env_kwargs)
    if config.relabels:
        raise ConfigError("data.return_source: the windows of a Ray Dataset have logged returns-to-go, got value")
    episodes = episode_dataset(settings, spec)
    returns = episodes.map_batches(_episode_returns, batch_format="pyarrow", batch_size=None).to_pandas()
    all_ids = returns["episode_id"].to_numpy()
    ids = all_ids[
        chosen_episodes(
            all_ids,
            returns["return"].to_numpy(),
            max_episodes=settings.max_episodes,
            top_fraction=settings.top_fraction,
        )
    ]
    held_out = ids[held_out_episodes(len(ids), settings.validation_fraction, seed=config.seed)]
    wanted = held_out if split == "validation" else np.setdiff1d(ids, held_out)

    returns = return_source_of(config)

    def cut(table: pa.Table) -> Iterator[dict[str, np.ndarray]]:
        data = from_table(table, source=settings.path)
        data = data.select(np.flatnonzero(np.isin(data.episode_ids, wanted))).with_return_source(returns)
        for begin in range(0, data.num_transitions, WINDOWS_PER_BLOCK):
            anchors = np.arange(begin, min(begin + WINDOWS_PER_BLOCK, data.num_transitions))
            yield asdict(slice_windows(data, anchors, length=config.model.context_length, discount=settings.discount))

    return episodes.map_batches(cut, batch_format="pyarrow", batch_size=None)


def sound_files_on_ray(config: DataConfig, spec: SpaceSpec | None) -> tuple[list[DatasetFile], int]:
    """`sound_files`, looked for by tasks."""
    files, num_skipped = sound_files(
        config,
        lambda files: ray.get([_fault_in_file.remote(file, config, spec) for file in files]),
        lambda files: ray.get([_episode_ids.remote(file) for file in files]),
        find=blocks_of_function if config.is_function else find_files,
    )
    warn_of_small_log(files, config)
    return files, num_skipped


def warn_of_small_log(files: Sequence[DatasetFile], config: DataConfig) -> None:
    """Logs what looks wrong with the episodes of a log that is small enough to look through for that."""
    doubtful = len(files) == 1 or not is_flat(files[0], config)  # for others the plan warns
    if doubtful and has_rows(files[0]) and sum(file.size for file in files) < MAX_LOOKED_AT:
        warn_of(look.doubt for look in ray.get([_look_into.remote(file, config) for file in files]))


def _read(reader: EpisodeReader, index: int = 0) -> pa.Table:
    return reader.read_to_join(index) if reader.joins else to_table(reader.read(index).data)


_read_file = ray.remote(_read)


def _episode_returns(table: pa.Table) -> pa.Table:
    data = from_table(table, source="")
    return pa.table({"episode_id": data.episode_ids, "return": data.episode_returns})


@ray.remote
def _fault_in_file(file: DatasetFile, config: DataConfig, spec: SpaceSpec | None) -> str | None:
    return fault_in_file(file, config, spec)


@ray.remote
def _look_into(file: DatasetFile, config: DataConfig) -> FileEpisodes:
    return look_into(file, config)


@ray.remote
def _read_clock(file: DatasetFile, config: DataConfig) -> FileClock | None:
    return read_clock(file, config)


@ray.remote
def _episode_ids(file: DatasetFile) -> np.ndarray:
    return read_episode_ids(file)


@ray.remote
def _shape_of(file: DatasetFile, config: DataConfig) -> FileShape:
    return read_shape_of(file, config)


@ray.remote
def _ranges_of(file: DatasetFile, config: DataConfig) -> list[RowRange] | None:
    return find_ranges(file, config)

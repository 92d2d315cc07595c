"""The data's way into the workers, on Ray Data: read, check and pack in parallel, lay out once, share by memory."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import ray
import ray.data

from dt_ray.config.schema import DataConfig, RunConfig
from dt_ray.data.clocks import FileClock, read_clock
from dt_ray.data.episodes import from_table
from dt_ray.data.files import DatasetFile
from dt_ray.data.flat import join_fragments
from dt_ray.data.formats import has_rows, is_flat
from dt_ray.data.looks import look_into, read_schema_of
from dt_ray.data.plan import FileEpisodes
from dt_ray.data.reading import (
    check_alike,
    find_fault_in,
    make_plans,
    read_episode_ids,
    read_file,
    sound_files,
    warn_of,
)
from dt_ray.data.spaces import SpaceSpec, read_spaces
from dt_ray.data.transitions import chosen_episodes, held_out_episodes
from dt_ray.data.windows import slice_windows
from dt_ray.distributed.cluster import user_errors
from dt_ray.distributed.usage import saying_when_full
from dt_ray.errors import ConfigError
from dt_ray.runs.storage import Folder
from dt_ray.training.resident import ResidentData
from dt_ray.training.streaming import StreamingData, episode_statistics, streams

log = logging.getLogger("dt_ray")

MAX_PARTITIONS = 16
# Settings that matter only after the episodes are read.
SETTINGS_READ_LATER = ("max_episodes", "top_fraction", "return_source", "values", "return_scale", "return_noise",
                       "discount", "validation_fraction", "window_length")  # fmt: skip
READ_ALIKE: dict[str, Any] = {name: getattr(DataConfig(), name) for name in SETTINGS_READ_LATER}
WINDOWS_PER_BLOCK = 4096
MAX_LOOKED_AT = 2**26  # bytes of rows that are looked through before they are read: tasks can't warn anybody


def prepare_data(config: RunConfig, spec: SpaceSpec) -> ray.ObjectRef:
    """`ResidentData` in the object store, which workers on a node map without a copy, or `StreamingData`.

    Raises:
        DataError: the dataset can't be read or trained on; the file, the episode and the step are named.
    """
    return prepare_layouts([config], spec)[0]


def prepare_layouts(configs: Sequence[RunConfig], spec: SpaceSpec) -> list[ray.ObjectRef]:
    """`prepare_data` for several runs; what they read alike is read once.

    Raises:
        DataError: as `prepare_data`.
    """
    read: dict[str, tuple[Sequence[Any], int]] = {}  # blocks of episodes, and how many files were left out
    laid_out = []
    with user_errors(), saying_when_full("data tasks"):
        for config in configs:
            key = repr(replace(config.data, **READ_ALIKE))
            if key not in read:
                files, num_skipped = _sound_files(config.data, spec)
                if streams(files, config):
                    statistics = pa.concat_tables(ray.get([_statistics.remote(file, config, spec) for file in files]))
                    data = StreamingData.build(files, statistics, spec, config, num_skipped_files=num_skipped)
                    laid_out.append(ray.put(data))
                    continue
                read[key] = episode_dataset(config.data, spec, files=files).materialize().to_arrow_refs(), num_skipped
            blocks, num_skipped = read[key]
            laid_out.append(_lay_out.remote(config, spec, num_skipped, *blocks))
        for note in dict.fromkeys(
            note for notes in ray.get([_notes.remote(data) for data in laid_out]) for note in notes
        ):
            log.warning("%s", note)
    return laid_out


def check_checkpoint_on_ray(checkpoint: Folder, config: RunConfig, data: ray.ObjectRef) -> None:
    """Raises:
    RunError: the run can't go on from this checkpoint on this data.
    """
    with user_errors():
        ray.get(_check_checkpoint.remote(checkpoint, config, data))


def episode_dataset(
    config: DataConfig, spec: SpaceSpec | None, *, files: Sequence[DatasetFile] | None = None
) -> ray.data.Dataset:
    """The checked episodes of a dataset's sound files, or of `files`, a row each, in the columns of `data.episodes`.

    Flat transitions are cut into fragments file by file; where files share episodes, their fragments meet by a shuffle.

    Raises:
        DataError: nothing there, or files of both kinds; what is wrong inside a file is raised when it is read.
    """
    with user_errors():
        files = _sound_files(config, spec)[0] if files is None else files
        plans = make_plans(files, config, lambda files: ray.get([_look_into.remote(file, config) for file in files]))
        first = {files[0].path: ray.get(_schema_of.remote(files[0], config))} if len(files) > 1 else {}
    joins = plans[0] is not None and plans[0].joins
    labels = plans[0].labels if plans[0] is not None else {}

    def read(units: pa.Table) -> Iterator[pa.Table]:
        for index in units["index"].to_pylist():
            table = read_file(files[index], config, spec, plan=plans[index])
            check_alike(first | {files[index].path: table.schema})
            yield table

    def join(fragments: pa.Table) -> pa.Table:
        return join_fragments(fragments, time_limit=config.time_limit, labels=labels) if len(fragments) else fragments

    units = [{"index": index} for index in range(len(files))]
    dataset = ray.data.from_items(units, override_num_blocks=min(len(units), 4 * MAX_PARTITIONS))
    dataset.context.enable_progress_bars = False
    dataset.context.execution_options.preserve_order = True  # episodes keep the order of their files
    dataset = dataset.map_batches(read, batch_format="pyarrow", batch_size=None)
    if joins:
        dataset.context.target_max_block_size = None  # a partition cut into blocks could cut an episode
        dataset = dataset.repartition(min(len(files), MAX_PARTITIONS), keys=["episode_id"])
        dataset = dataset.map_batches(join, batch_format="pyarrow", batch_size=None)
    return dataset


def episode_tables(config: DataConfig, spec: SpaceSpec | None) -> Iterator[pa.Table]:
    """The checked episodes of a dataset, block by block: the driver holds one at a time."""
    with user_errors(), saying_when_full("data tasks"):
        for block in episode_dataset(config, spec).iter_batches(batch_size=None, batch_format="pyarrow"):
            if len(block):
                yield block


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
    spec, settings = read_spaces(config.env_id, config.env_kwargs), config.data
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

    def cut(table: pa.Table) -> Iterator[dict[str, np.ndarray]]:
        data = from_table(table, source=settings.path)
        data = data.select(np.flatnonzero(np.isin(data.episode_ids, wanted))).with_return_source(config.return_source)
        for begin in range(0, data.num_transitions, WINDOWS_PER_BLOCK):
            anchors = np.arange(begin, min(begin + WINDOWS_PER_BLOCK, data.num_transitions))
            yield asdict(slice_windows(data, anchors, length=config.model.context_length, discount=settings.discount))

    return episodes.map_batches(cut, batch_format="pyarrow", batch_size=None)


def _sound_files(config: DataConfig, spec: SpaceSpec | None) -> tuple[list[DatasetFile], int]:
    files, num_skipped = sound_files(
        config,
        lambda files: ray.get([_find_fault.remote(file, config, spec) for file in files]),
        lambda files: ray.get([_episode_ids.remote(file) for file in files]),
    )
    doubtful = len(files) == 1 or not is_flat(files[0], config)  # of others their plan knows
    if doubtful and has_rows(files[0]) and sum(file.size for file in files) < MAX_LOOKED_AT:
        warn_of(look.doubt for look in ray.get([_look_into.remote(file, config) for file in files]))
    return files, num_skipped


def _episode_returns(table: pa.Table) -> pa.Table:
    data = from_table(table, source="")
    return pa.table({"episode_id": data.episode_ids, "return": data.episode_returns})


@ray.remote
def _statistics(file: DatasetFile, config: RunConfig, spec: SpaceSpec) -> pa.Table:
    return episode_statistics(file, config, spec)


@ray.remote
def _find_fault(file: DatasetFile, config: DataConfig, spec: SpaceSpec | None) -> str | None:
    return find_fault_in(file, config, spec)


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
def _schema_of(file: DatasetFile, config: DataConfig) -> pa.Schema:
    return read_schema_of(file, config)


@ray.remote
def _lay_out(config: RunConfig, spec: SpaceSpec, num_skipped_files: int, *blocks: pa.Table) -> ResidentData:
    episodes = from_table(pa.concat_tables([block for block in blocks if len(block)]), source=config.data.path)
    return ResidentData.build(episodes, spec, config, num_skipped_files=num_skipped_files)


@ray.remote
def _notes(data: ResidentData | StreamingData) -> tuple[str, ...]:
    """What looks wrong with the data, or what `_lay_out` raised, without the data in the driver's memory."""
    return data.notes


@ray.remote
def _check_checkpoint(checkpoint: Folder, config: RunConfig, data: ResidentData | StreamingData) -> None:
    from dt_ray.training.loop import check_checkpoint

    check_checkpoint(checkpoint, config, data.spec, data.normalizer, getattr(data, "values", None))

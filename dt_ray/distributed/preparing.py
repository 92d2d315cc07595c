"""Prepares the data for a run's workers: read in parallel, laid out in parts, shared in memory.

One task plans the layout. Then one task for each part of the table writes it, from the blocks of its own episodes only.
As soon as these tasks are submitted, only they hold the blocks.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from jaxtyping import Int
from numpy import ndarray

from dt_ray.config.schema import DataConfig, RunConfig
from dt_ray.data.blocks import EpisodeBlocks
from dt_ray.data.logs.datasets import ReadEpisodes
from dt_ray.data.logs.episodes import from_table, to_table
from dt_ray.data.logs.files import DatasetFile
from dt_ray.data.returns import Tail
from dt_ray.data.spaces import SpaceSpec
from dt_ray.data.transitions import TransitionDataset
from dt_ray.distributed.cluster import user_errors
from dt_ray.distributed.usage import saying_when_full
from dt_ray.runs.storage import Folder
from dt_ray.training.file_facts import SETTINGS_READ_LATER, FileFacts
from dt_ray.training.layout import Layout, plan_layout
from dt_ray.training.preparing import residency_of
from dt_ray.training.resident import ResidentData
from dt_ray.training.sharded import ShardedData
from dt_ray.training.stream_facts import StreamingData

log = logging.getLogger("dt_ray")

PART_BYTES = 2**26  # of a table that one task writes
BLOCK_BYTES = 2**24  # of a block of episodes that were read in the driver
READ_ALIKE: dict[str, Any] = {name: getattr(DataConfig(), name) for name in SETTINGS_READ_LATER}


@dataclass(frozen=True)
class SharedData:
    """The data of a run in the object store, which the processes of a node map without a copy."""

    head: ray.ObjectRef  # `StreamingData`, `ShardedData`, or `ResidentData` whose training table's rows lie in `parts`
    parts: tuple[ray.ObjectRef, ...] = ()  # none: they are in `head`
    shards: tuple[Any, ...] = ()  # the Ray Datasets with the blocks of `ShardedData`

    def fetch(self) -> ResidentData | StreamingData | ShardedData:
        data, *parts = ray.get([self.head, *self.parts])
        return replace(data, train=replace(data.train, parts=tuple(parts))) if parts else data


@dataclass(frozen=True)
class Part:
    """The arguments of the task that writes a part of a table."""

    layout: Layout
    blocks: Int[ndarray, "_"]  # that its episodes lie in
    chunks: Sequence[Int[ndarray, "_"]]  # episodes, numbered through these blocks
    tails: Sequence[Tail | None]


def prepare_data(config: RunConfig, spec: SpaceSpec, read: ReadEpisodes | None = None) -> SharedData:
    """The data of a run, read by tasks; what this process has `read` before is not read again where it fits.

    Raises:
        DataError: the dataset can't be read or trained on; the file, the episode and the step are named.
    """
    return prepare_layouts([config], spec, read)[0]


def prepare_layouts(
    configs: Sequence[RunConfig], spec: SpaceSpec, read: ReadEpisodes | None = None
) -> list[SharedData]:
    """`prepare_data` for several runs; data that they share is read once.

    Raises:
        DataError: as `prepare_data`.
    """
    alike: dict[str, list[int]] = {}
    for at, config in enumerate(configs):
        alike.setdefault(repr(replace(config.data, **READ_ALIKE)), []).append(at)
    found: dict[int, SharedData] = {}
    notes: dict[str, None] = {}  # each once, in order
    # Workers start without Ray Data.
    from dt_ray.distributed.data import episode_dataset, sound_files_on_ray, warn_of_small_log

    with user_errors(), saying_when_full("data tasks"):
        for group in alike.values():
            settings = configs[group[0]].data
            known = read if read is not None and read.suits(settings, spec) else None
            facts = {at: FileFacts(configs[at], spec, for_each=for_each_on_ray) for at in group}
            if known is not None:
                files, num_skipped = known.sound_files
            elif settings.is_function:
                files, num_skipped = sound_files_on_ray(settings, spec)
            else:
                files, num_skipped = facts[group[0]].sound_files()
                warn_of_small_log(files, settings)
            residencies = {at: residency_of(files, configs[at]) for at in group}
            held = [at for at in group if residencies[at] != "resident"]
            for at in held:
                if residencies[at] == "dataset":
                    found[at], warnings = _shard(configs[at], spec, files, num_skipped)
                    notes |= dict.fromkeys(warnings)
                    continue
                data = StreamingData.build(files, facts[at], num_skipped_files=num_skipped)
                notes |= dict.fromkeys(data.notes)
                found[at] = SharedData(ray.put(data))
            if len(held) == len(group):
                if known is not None:
                    known.let_go()
                continue
            if known is not None:
                blocks = list(_put(known.take()))
            else:
                blocks = episode_dataset(settings, spec, files=files).materialize().to_arrow_refs()
            for at in sorted(set(group) - set(held)):
                found[at], warnings = _share(configs[at], spec, num_skipped, blocks)
                notes |= dict.fromkeys(warnings)
            del blocks  # only the tasks that write parts hold them now
        if parts := [part for data in found.values() for part in data.parts]:
            ray.wait(parts, num_returns=len(parts), fetch_local=False)  # while there are CPUs for them
    for note in notes:
        log.warning("%s", note)
    return [found[at] for at in range(len(configs))]


def _put(parts: Iterable[TransitionDataset]) -> Iterator[ray.ObjectRef]:
    """The episodes in the object store, small parts together."""
    tables: list[pa.Table] = []
    for part in parts:
        tables.append(to_table(part))
        if sum(table.nbytes for table in tables) >= BLOCK_BYTES:
            yield ray.put(pa.concat_tables(tables))
            tables = []
    if tables:
        yield ray.put(pa.concat_tables(tables))


def _shard(
    config: RunConfig, spec: SpaceSpec, files: Sequence[DatasetFile], num_skipped_files: int
) -> tuple[SharedData, Sequence[str]]:
    """The data in shuffled blocks of episodes, and what looks wrong with it."""
    from dt_ray.distributed.data import episode_dataset
    from dt_ray.distributed.shards import shard_episodes

    episodes = episode_dataset(config.data, spec, files=files)
    data, shards = shard_episodes(episodes, config, spec, num_skipped_files=num_skipped_files, for_each=for_each_on_ray)
    return SharedData(ray.put(data), shards=shards), data.notes


def _share(
    config: RunConfig, spec: SpaceSpec, num_skipped_files: int, blocks: Sequence[Any]
) -> tuple[SharedData, Sequence[str]]:
    """The data laid out from its blocks, and what looks wrong with it."""
    head, told = _lay_out.remote(config, spec, num_skipped_files, *blocks)  # type: ignore[misc]
    parts, notes = ray.get(told)
    memory = 2 * PART_BYTES
    written = [_write_part.options(memory=memory).remote(part, *(blocks[at] for at in part.blocks)) for part in parts]
    return SharedData(head, tuple(written)), notes


@ray.remote(num_returns=2)
def _lay_out(
    config: RunConfig, spec: SpaceSpec, num_skipped_files: int, *tables: pa.Table
) -> tuple[ResidentData, tuple[list[Part], tuple[str, ...]]]:
    """The data, and the parts that are to be written; small tables are written here."""
    given = EpisodeBlocks(from_table(table, source=config.data.path) for table in tables if len(table))
    layout, blocks = plan_layout(given, spec, config)
    validation = layout.write(blocks, layout.validation) if len(layout.validation) else None
    chunks, tails = layout.chunks(blocks, layout.train)
    edges = _edges(blocks, chunks)
    if len(edges) == 2 or config.relabels:
        train = layout.write(blocks, layout.train, last_use=True)
        return ResidentData.of(layout, train, validation, num_skipped_files=num_skipped_files), ([], layout.notes)
    brief = replace(layout, train=np.empty(0, np.int64), validation=np.empty(0, np.int64), held_out=None)
    full = np.flatnonzero([len(table) > 0 for table in tables])
    parts = [_part(blocks, brief, full, chunks[begin:end], tails[begin:end]) for begin, end in pairwise(edges)]
    num_episodes = np.cumsum([0, *map(len, chunks)])
    train = layout.table(blocks, layout.train, (), num_episodes[edges[:-1]])
    return ResidentData.of(layout, train, validation, num_skipped_files=num_skipped_files), (parts, layout.notes)


def _edges(blocks: EpisodeBlocks, chunks: Sequence[Int[ndarray, "_"]]) -> list[int]:
    """Where the parts of a table begin among its chunks, and the number of these."""
    width = blocks.observation_dim + blocks.action_dim + 1
    sizes = [int(blocks.lengths[chunk].sum()) * width * np.dtype(np.float32).itemsize for chunk in chunks]
    numbers = (np.cumsum(sizes) - 1) // PART_BYTES
    return [0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist(), len(chunks)]


def _part(
    blocks: EpisodeBlocks,
    layout: Layout,
    full: Int[ndarray, "_"],
    chunks: Sequence[Int[ndarray, "_"]],
    tails: Sequence[Tail | None],
) -> Part:
    """A part of these chunks; `full` are the places of the blocks among those that a task is given."""
    needed, firsts = blocks.renumbered(np.concatenate(chunks))
    return Part(layout, full[needed], [chunk - firsts[blocks.block_of[chunk]] for chunk in chunks], tails)


@ray.remote
def _write_part(part: Part, *tables: pa.Table) -> ndarray:
    returns = "rewards" if not part.layout.takes_logged_returns else None
    blocks = EpisodeBlocks(from_table(table, source="").with_return_source(returns) for table in tables)
    return part.layout.write_chunks(blocks, part.chunks, part.tails)


def for_each_on_ray(function: Callable[[DatasetFile], Any], files: Sequence[DatasetFile]) -> list[Any]:
    """What the function finds of each file, by a task each."""
    shared = ray.put(function)  # once, and not with each task
    return ray.get([_of_file.remote(shared, file) for file in files])


@ray.remote
def _of_file(function: Callable[[DatasetFile], Any], file: DatasetFile) -> Any:
    return function(file)


def check_checkpoint_on_ray(checkpoint: Folder, config: RunConfig, data: SharedData) -> None:
    """Raises:
    RunError: the run can't go on from this checkpoint on this data.
    """
    with user_errors():
        ray.get(_check_checkpoint.remote(checkpoint, config, data.head))


@ray.remote
def _check_checkpoint(checkpoint: Folder, config: RunConfig, data: ResidentData | StreamingData | ShardedData) -> None:
    from dt_ray.training.loop import check_checkpoint

    check_checkpoint(checkpoint, config, data.spec, data.normalizer, getattr(data, "values", None))

"""Reads files into checked episodes, one file at a time; Ray's tasks and a single process both use it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import pyarrow as pa

from dt_ray.config.schema import DataConfig
from dt_ray.data.formats import has_rows, is_flat, read_minari, read_rows
from dt_ray.data.formats.tables import read_parquet
from dt_ray.data.logs.checks import NOT_FINITE, OUT_OF_BOUNDS, faults_in
from dt_ray.data.logs.episodes import from_table
from dt_ray.data.logs.files import DatasetFile, RowRange
from dt_ray.data.logs.flat import Fragments, cut_fragments
from dt_ray.data.logs.joining import fragment_table, join_fragments
from dt_ray.data.logs.looks import FileShape, look_into, read_shape_of
from dt_ray.data.logs.numbering import own_ids
from dt_ray.data.logs.plan import FileEpisodes, FilePlan, plan_files
from dt_ray.data.logs.row_ranges import divided, divided_plans, find_ranges
from dt_ray.data.spaces import SpaceSpec
from dt_ray.data.transitions import SOURCE_BITS, TransitionDataset
from dt_ray.errors import DataError

MAX_LISTED_FAULTS = 5
BOUNDS_HINT = "data.action_scale scales actions, data.out_of_bounds=clip clips them"
MISSING_HINT = "leave such episodes out of the log, or fill the values in"

log = logging.getLogger("dt_ray")


@dataclass(frozen=True, kw_only=True)
class EpisodeReader:
    """Reads the files of a dataset one by one, in any process; holds what reading one needs to know of the others."""

    files: Sequence[DatasetFile]
    plans: Sequence[FilePlan | None]  # None: the file can be read without the others
    first: FileShape  # of the first file; the others must have the same
    config: DataConfig
    spec: SpaceSpec | None

    @classmethod
    def of(
        cls,
        files: Sequence[DatasetFile],
        config: DataConfig,
        spec: SpaceSpec | None,
        *,
        look: Callable[[Sequence[DatasetFile]], list[FileEpisodes]],
        shape_of: Callable[[DatasetFile], FileShape],
        ranges_of: Callable[[Sequence[DatasetFile]], Iterable[Sequence[RowRange] | None]],
    ) -> EpisodeReader:
        """Gathers what reading needs to know of the files, here or on a cluster; large ones are divided into ranges.

        Raises:
            DataError: files of both kinds, or timesteps that don't go together.
        """
        plans: Sequence[FilePlan | None] = [None] * len(files)
        if may_share_episodes(files, config) and len(files) > 1:
            looks = look(files)
            warn_of(found.doubt for found in looks)
            plans = plan_files(files, looks, config.episodes_across_files)
        first = shape_of(files[0])
        files = divided(files, config, ranges_of)
        return cls(files=files, plans=divided_plans(plans, files), first=first, config=config, spec=spec)

    def for_file(self, index: int) -> EpisodeReader:
        """The reader of one file alone, as its first one."""
        return replace(self, files=self.files[index : index + 1], plans=self.plans[index : index + 1])

    @property
    def joins(self) -> bool:
        """Whether episodes lie in several files: then files give fragments, which `join` puts together."""
        return self.plans[0] is not None and self.plans[0].joins

    def read(self, index: int) -> Fragments:
        """The checked episodes of a file, or its fragments of them; actions are in the environment's units.

        Raises:
            DataError: the file is unreadable or empty, is unlike the first one, or has faults: each is named by file,
                episode and step.
        """
        file = self.files[index]
        found = read_fragments(file, self.config, self.spec, plan=self.plans[index])
        check_alike(self.first, FileShape.of(file, found.data))
        return found

    def read_to_join(self, index: int) -> pa.Table:
        """The fragments of a file as a table, for `join`."""
        return fragment_table(self.read(index), file_index=self.files[index].order)

    def join(self, fragments: pa.Table) -> TransitionDataset:
        """Joins fragments that together hold whole episodes.

        Raises:
            DataError: the fragments of an episode contradict one another.
        """
        first = self.plans[0]
        assert first is not None
        return join_fragments(fragments, time_limit=self.config.time_limit, labels=first.labels)


def read_blocks(
    config: DataConfig, spec: SpaceSpec | None, files: Sequence[DatasetFile]
) -> Iterator[TransitionDataset]:
    """The episodes of these files, read in this process: file by file, or all at once where files share episodes.

    Raises:
        DataError: as `EpisodeReader` and what it reads.
    """
    reader = EpisodeReader.of(
        files,
        config,
        spec,
        look=lambda files: [look_into(file, config) for file in files],
        shape_of=lambda file: read_shape_of(file, config),
        ranges_of=lambda files: [find_ranges(file, config) for file in files],
    )
    indices = range(len(reader.files))
    if reader.joins:
        yield reader.join(pa.concat_tables([reader.read_to_join(index) for index in indices]))
        return
    doubts: list[str | None] = []
    for index in indices:
        found = reader.read(index)
        doubts.append(found.doubt if reader.plans[index] is None else None)
        yield found.data
        del found
        pa.default_memory_pool().release_unused()  # of what was read and decoded to make this
    warn_of(doubts)


def read_fragments(
    file: DatasetFile,
    config: DataConfig,
    spec: SpaceSpec | None,
    *,
    plan: FilePlan | None = None,
    with_own_ids: bool = True,
) -> Fragments:
    """The checked episodes of one file, or, under a plan that joins, its fragments; actions in the environment's units.

    Without a plan each has an id of its own, unless these are to be given later (`own_ids`).

    Raises:
        DataError: the file is unreadable or empty, or has faults: each named by file, episode and step.
    """
    if file.block is not None and file.block.is_checked:
        return Fragments(from_table(file.block.load(), source=file.path), None, {}, None)
    if has_rows(file):
        rows, names = read_rows(file, config)
        found = cut_fragments(
            rows,
            names,
            ids=None if plan is None else plan.ids,
            known=file.rows,
            joins=plan is not None and plan.joins,
            time_limit=config.time_limit,
            is_one=config.episode_per_file,
            source=file.path,
        )
    elif config.columns:
        raise DataError(
            f"{file.path} holds whole episodes, whose columns have names of their own: leave out data.columns "
            f"(--column), got {', '.join(sorted(config.columns))}"
        )
    elif config.episode_per_file:
        raise DataError(
            f"{file.path} holds whole episodes, each with a row of its own: leave out data.episode_per_file "
            f"(--episode-per-file)"
        )
    else:
        data = read_minari(file) if file.format == "minari" else from_table(read_parquet(file), source=file.path)
        found = Fragments(data.with_time_limit(config.time_limit), None, {}, None)
    data = found.data
    if not data.num_episodes:
        raise DataError(f"{file.path} is empty: there is no episode in it")
    data = _with_actions(data, config, spec)
    raise_faults(data, spec, source=file.path, labels=found.labels, may_be_skipped=not is_flat(file, config))
    if (plan is None and with_own_ids and file.rows is None) or config.episode_per_file:
        data = replace(data, episode_ids=own_ids(data.episode_ids, file, config))
    return found._replace(data=_marked(data, file.source) if config.mix else data)


def _with_actions(data: TransitionDataset, config: DataConfig, spec: SpaceSpec | None) -> TransitionDataset:
    """The same with actions in the environment's units, and within its bounds where `data.out_of_bounds` says so."""
    if config.action_scale != 1.0:
        data = replace(data, actions=data.actions * np.float32(config.action_scale))
    return data if spec is None else with_clipped_actions(data, config, spec)


def with_clipped_actions(data: TransitionDataset, config: DataConfig, spec: SpaceSpec) -> TransitionDataset:
    """The same with actions within the bounds of `spec`, where `data.out_of_bounds` says so."""
    if config.out_of_bounds != "clip" or len(spec.action_low) != data.actions.shape[1]:
        return data
    return replace(data, actions=np.clip(data.actions, spec.action_low, spec.action_high).astype(np.float32))


def _marked(data: TransitionDataset, source: int) -> TransitionDataset:
    """The same with ids that say which of several datasets they come from.

    Raises:
        DataError: the ids leave no room for that.
    """
    ids = data.episode_ids
    if (ids >> SOURCE_BITS).any():
        raise DataError(f"episode ids of datasets that are mixed must be 0..{2**SOURCE_BITS - 1}, got {ids.max()}")
    return replace(data, episode_ids=ids + (source << SOURCE_BITS))


def read_episodes(file: DatasetFile, config: DataConfig, spec: SpaceSpec | None) -> TransitionDataset:
    """The checked episodes of a file that holds them whole."""
    return read_fragments(file, config, spec).data


def fault_in_file(file: DatasetFile, config: DataConfig, spec: SpaceSpec | None) -> str | None:
    """Why a file can't be trained on; None where it can."""
    try:
        for part in divided([file], config, lambda files: [find_ranges(file, config) for file in files]):
            read_episodes(part, config, spec)
    except DataError as error:
        return str(error)
    return None


def warn_of(doubts: Iterable[str | None]) -> None:
    """Logs one warning: the first doubt, and how many files have one."""
    if found := [doubt for doubt in doubts if doubt]:
        log.warning("%s%s", found[0], f"; so in {len(found)} files" if len(found) > 1 else "")


def may_share_episodes(files: Sequence[DatasetFile], config: DataConfig) -> bool:
    """Whether episodes may continue from file to file; that is the same for all files.

    Raises:
        DataError: it has files of both kinds.
    """
    flat = [is_flat(file, config) for file in files]
    if len(set(flat)) > 1:
        one, other = files[flat.index(True)].path, files[flat.index(False)].path
        raise DataError(f"{one} has a row per step but {other} a row per episode; a dataset has files of one kind")
    return flat[0]


def check_alike(first: FileShape, other: FileShape) -> None:
    """Raises:
    DataError: two files hold observations or actions of different dimensions, or only one has returns-to-go.
    """
    if other.dimensions != first.dimensions:
        raise DataError(
            f"{first.path} has (observation, action) dimensions {first.dimensions} but {other.path} has "
            f"{other.dimensions}; a dataset has files of one kind"
        )
    if first.has_returns != other.has_returns:
        with_returns, without = (first, other) if first.has_returns else (other, first)
        raise DataError(
            f"{with_returns.path} has a column of returns-to-go but {without.path} has none; write it into all files "
            f"or none, or leave it out by data.columns.return_to_go=null"
        )


def raise_faults(
    data: TransitionDataset,
    spec: SpaceSpec | None,
    *,
    source: str,
    labels: Mapping[int, str] | None = None,
    may_be_skipped: bool = False,
) -> None:
    """Raises:
    DataError: the first faults of a file, each named by episode and step, and what mends them.
    """
    faults = list(islice(faults_in(data, spec, labels), MAX_LISTED_FAULTS + 1))
    if faults:
        hints = [
            *([BOUNDS_HINT] if any(OUT_OF_BOUNDS in fault for fault in faults) else []),
            *([MISSING_HINT] if any(NOT_FINITE in fault for fault in faults) else []),
        ]
        if hints and may_be_skipped:
            hints.append("data.on_corrupt=skip leaves out the whole file")
        more = ["and more"] if len(faults) > MAX_LISTED_FAULTS else []
        lines = "".join(f"\n  {line}" for line in [*faults[:MAX_LISTED_FAULTS], *more])
        raise DataError("; ".join([f"{source} can't be trained on", *hints]) + f":{lines}")

"""From files to checked episodes, one file at a time: what the Ray pipeline and a single process both call."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, islice
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import Int
from numpy import ndarray

from dt_ray.config import DataConfig
from dt_ray.data.checks import find_faults
from dt_ray.data.episodes import from_table, mark_source, read_metadata, scale_actions, to_table
from dt_ray.data.files import DatasetFile, find_files
from dt_ray.data.flat import ColumnNames, column_names, count_ends, cut_fragments, episodes_of_rows, join_fragments
from dt_ray.data.formats import EPISODE_READERS, is_flat, read_rows
from dt_ray.data.formats.tables import read_parquet
from dt_ray.data.spaces import SpaceSpec
from dt_ray.data.transitions import SOURCE_BITS, TransitionDataset
from dt_ray.errors import DataError

SHOWN_FAULTS = 5
SCALE_HINT = "; data.action_scale scales actions, data.out_of_bounds=clip clips them"

log = logging.getLogger("dt_ray")


def sound_files(
    config: DataConfig, find_faults_of: Callable[[list[DatasetFile]], list[str | None]]
) -> tuple[list[DatasetFile], int]:
    """The files to train on, and how many `data.on_corrupt=skip` leaves out; what is wrong with those is logged.

    Raises:
        DataError: nothing there, nothing sound there, or a row per step, where an episode can go on in a lost file.
    """
    all_files = [
        replace(file, source=source)
        for source, path in enumerate(config.paths)
        for file in find_files(path, config.format)
    ]
    files = [replace(file, index=index) for index, file in enumerate(all_files)]
    if config.on_corrupt == "stop":
        return files, 0
    found = find_faults_of(files)
    sound = [file for file, fault in zip(files, found, strict=True) if fault is None]
    faults = [fault for fault in found if fault is not None]
    if not sound:
        raise DataError(f"no file of {', '.join(config.paths)} can be trained on; the first: {faults[0]}")
    if faults and is_flat(sound[0]):
        raise DataError(
            f"data.on_corrupt=skip leaves out whole files, and {sound[0].dataset} has a row per step: an episode may "
            f"go on in a file that is left out; mend it, or import what is sound first: {faults[0]}"
        )
    for fault in faults:
        log.warning("left out: %s", fault)
    return sound, len(faults)


def sound_files_here(config: DataConfig, spec: SpaceSpec | None) -> tuple[list[DatasetFile], int]:
    """`sound_files`, looked for in this process."""
    return sound_files(config, lambda files: [find_fault_in(file, config, spec) for file in files])


def find_fault_in(file: DatasetFile, config: DataConfig, spec: SpaceSpec | None) -> str | None:
    """Why a file can't be trained on; None where it can."""
    try:
        read_file(file, config, spec)
    except DataError as error:
        return str(error)
    return None


class FlatFile(NamedTuple):
    """What must be known of a flat file beside others."""

    num_ends: int  # of episodes, where the log doesn't number them
    episode_ids: Int[ndarray, "E"]  # of those with rows in it; counted from 0 where the log doesn't number them
    are_numbered: bool


def look_into(file: DatasetFile, config: DataConfig) -> FlatFile:
    """Which episodes have rows in a flat file, without its steps."""
    rows, names = _read_named(file, config, "episode_id", "terminated", "truncated")
    ids = np.unique(episodes_of_rows(rows, names, num_ends_before=0, source=file.path))
    are_numbered = "episode_id" in names
    return FlatFile(0 if are_numbered else count_ends(rows, names), ids, are_numbered)


def ends_before(looks: Sequence[FlatFile]) -> list[int]:
    """For each file, the episodes that end in the files before it."""
    return list(accumulate((look.num_ends for look in looks), initial=0))


def share_episodes(files: Sequence[DatasetFile], looks: Sequence[FlatFile]) -> bool:
    """Whether an episode has rows in several of these files."""
    ids = [
        look.episode_ids + (0 if look.are_numbered else before) + (file.source << SOURCE_BITS)
        for file, look, before in zip(files, looks, ends_before(looks), strict=False)
    ]
    return len(np.unique(np.concatenate(ids))) < sum(map(len, ids))


def read_file(file: DatasetFile, config: DataConfig, spec: SpaceSpec | None, *, num_ends_before: int = 0) -> pa.Table:
    """The checked episodes of one file, or of a flat file its fragments, actions in the environment's units.

    Raises:
        DataError: the file is unreadable or empty, or has faults: each named by file, episode and step.
    """
    flat = is_flat(file)
    if flat:
        rows, names = _read_named(file, config)
        table = cut_fragments(rows, names, file_index=file.index, num_ends_before=num_ends_before, source=file.path)
    else:
        read = EPISODE_READERS.get(file.format)
        if read is None:
            data = from_table(read_parquet(file), source=file.path)
        else:  # these count their episodes from 0 in each file
            data = read(file, config)
            data = replace(data, episode_ids=data.episode_ids + (file.index << 32))
        table = to_table(data.with_time_limit(config.time_limit))
    bounds = (spec.action_low, spec.action_high) if spec is not None and config.out_of_bounds == "clip" else None
    table = scale_actions(table, config.action_scale, bounds=bounds)
    if config.mix:
        table = mark_source(table, file.source)
    if not len(table):
        raise DataError(f"{file.path} is empty: there is no episode in it")
    raise_faults(from_table(table, source=file.path), spec, source=file.path, hint=SCALE_HINT if flat else "")
    return table


def _read_named(file: DatasetFile, config: DataConfig, *wanted: str) -> tuple[pa.Table, ColumnNames]:
    """A flat file's rows in our columns, or in the `wanted` ones of them, and what the file calls each of ours."""
    names: dict[str, tuple[str, ...]] = {}

    def choose(available: Sequence[str]) -> list[str]:
        names.update(column_names(available, config.columns, source=file.path))
        return [column for name in wanted or names for column in names.get(name, ())]

    rows = read_rows(file, choose)
    return rows, names


def read_episodes(file: DatasetFile, config: DataConfig, spec: SpaceSpec | None) -> TransitionDataset:
    """The checked episodes of a file that holds them whole."""
    return from_table(read_file(file, config, spec), source=file.path)


def read_dataset(
    config: DataConfig, spec: SpaceSpec | None = None, *, files: Sequence[DatasetFile] | None = None
) -> TransitionDataset:
    """All episodes of a dataset's sound files, or of these files, read in this process.

    Raises:
        DataError: as `read_file`, or files of different dimensions, or an episode that doesn't add up across files.
    """
    files = sound_files_here(config, spec)[0] if files is None else files
    flat = check_schemas(files)
    several = flat and len(files) > 1
    before = ends_before([look_into(file, config) for file in files]) if several else [0] * len(files)
    tables = [read_file(file, config, spec, num_ends_before=num) for file, num in zip(files, before, strict=False)]
    check_dimensions({file.path: table.schema for file, table in zip(files, tables, strict=True)})
    table = pa.concat_tables(tables)
    return from_table(join_fragments(table, time_limit=config.time_limit) if flat else table, source=config.paths[0])


def read_parts(config: DataConfig, spec: SpaceSpec | None = None) -> Iterator[TransitionDataset]:
    """The episodes of a dataset file by file, in this process; all at once where an episode may lie in several files.

    Raises:
        DataError: as `read_dataset`.
    """
    files = sound_files_here(config, spec)[0]
    if check_schemas(files):
        yield read_dataset(config, spec, files=files)
        return
    first: dict[str, pa.Schema] = {}
    for file in files:
        table = read_file(file, config, spec)
        first = first or {file.path: table.schema}
        check_dimensions(first | {file.path: table.schema})
        yield from_table(table, source=file.path)


def check_schemas(files: Sequence[DatasetFile]) -> bool:
    """Whether the dataset is flat: all of its files must be, or none.

    Raises:
        DataError: it has files of both kinds.
    """
    flat = [is_flat(file) for file in files]
    if len(set(flat)) > 1:
        one, other = files[flat.index(True)].path, files[flat.index(False)].path
        raise DataError(f"{one} has a row per step but {other} a row per episode; a dataset has files of one kind")
    return flat[0]


def check_dimensions(schemas: Mapping[str, pa.Schema]) -> None:
    """Raises:
    DataError: two files hold observations or actions of different dimensions.
    """
    facts = {
        path: tuple(read_metadata(schema)[key] for key in ("observation_dim", "action_dim"))
        for path, schema in schemas.items()
    }
    first, *rest = facts
    for path in rest:
        if facts[path] != facts[first]:
            raise DataError(
                f"{first} has (observation, action) dimensions {facts[first]} but {path} has {facts[path]}; "
                f"a dataset has files of one kind"
            )


def raise_faults(data: TransitionDataset, spec: SpaceSpec | None, *, source: str, hint: str = "") -> None:
    faults = list(islice(find_faults(data, spec), SHOWN_FAULTS + 1))
    if faults:
        more = "\n  and more" if len(faults) > SHOWN_FAULTS else ""
        lines = "".join(f"\n  {fault}" for fault in faults[:SHOWN_FAULTS])
        raise DataError(f"{source} can't be trained on{hint}:{lines}{more}")

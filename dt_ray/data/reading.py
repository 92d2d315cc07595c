"""From files to checked episodes, one file at a time: what the Ray pipeline and a single process both call."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice

import numpy as np
import pyarrow as pa
from jaxtyping import Int
from numpy import ndarray

from dt_ray.config.schema import DataConfig
from dt_ray.data.checks import find_faults
from dt_ray.data.episodes import (
    episode_ids_of,
    from_table,
    mark_source,
    read_metadata,
    scale_actions,
    to_table,
)
from dt_ray.data.files import DatasetFile, find_files
from dt_ray.data.flat import cut_fragments, join_fragments, unique_ids
from dt_ray.data.formats import has_rows, is_flat, read_minari, read_rows
from dt_ray.data.formats.tables import read_parquet
from dt_ray.data.looks import look_into
from dt_ray.data.plan import FileEpisodes, FilePlan, numbers_in_file, plan_files
from dt_ray.data.spaces import SpaceSpec
from dt_ray.data.transitions import TransitionDataset
from dt_ray.errors import DataError

SHOWN_FAULTS = 5
SCALE_HINT = "; data.action_scale scales actions, data.out_of_bounds=clip clips them"

log = logging.getLogger("dt_ray")


def sound_files(
    config: DataConfig,
    find_faults_of: Callable[[list[DatasetFile]], list[str | None]],
    ids_of: Callable[[list[DatasetFile]], list[Int[ndarray, "E"]]],
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
        return number_files(files, config, ids_of), 0
    found = find_faults_of(files)
    sound = [file for file, fault in zip(files, found, strict=True) if fault is None]
    faults = [fault for fault in found if fault is not None]
    if not sound:
        raise DataError(f"no file of {', '.join(config.paths)} can be trained on; the first: {faults[0]}")
    if faults and is_flat(sound[0], config):
        raise DataError(
            f"data.on_corrupt=skip leaves out whole files, and {sound[0].dataset} has a row per step: an episode may "
            f"go on in a file that is left out; mend it, or import what is sound first: {faults[0]}"
        )
    for fault in faults:
        log.warning("left out: %s", fault)
    return number_files(sound, config, ids_of), len(faults)


def number_files(
    files: list[DatasetFile], config: DataConfig, ids_of: Callable[[list[DatasetFile]], list[Int[ndarray, "E"]]]
) -> list[DatasetFile]:
    """The files, marked where their episode ids are those of other files too: they get their file's number besides.

    Raises:
        DataError: a file can't be read.
    """
    if is_flat(files[0], config):
        return files  # a plan numbers their episodes
    if not all(file.format == "parquet" for file in files):
        return [replace(file, is_numbered=True) for file in files]
    if len(files) == 1:
        return files
    ids = ids_of(files)
    own = {source: [found for file, found in zip(files, ids, strict=True) if file.source == source] for source in
           {file.source for file in files}}  # fmt: skip
    repeated = any(len(np.unique(np.concatenate(found))) < sum(map(len, found)) for found in own.values())
    return [replace(file, is_numbered=True) for file in files] if repeated else files


def read_episode_ids(file: DatasetFile) -> Int[ndarray, "E"]:
    """The logged ids of a file with a row per episode.

    Raises:
        DataError: the file can't be read.
    """
    return episode_ids_of(read_parquet(file, ["episode_id"]), source=file.path)


def sound_files_here(config: DataConfig, spec: SpaceSpec | None) -> tuple[list[DatasetFile], int]:
    """`sound_files`, looked for in this process."""
    return sound_files(
        config,
        lambda files: [find_fault_in(file, config, spec) for file in files],
        lambda files: [read_episode_ids(file) for file in files],
    )


def find_fault_in(file: DatasetFile, config: DataConfig, spec: SpaceSpec | None) -> str | None:
    """Why a file can't be trained on; None where it can."""
    try:
        read_file(file, config, spec)
    except DataError as error:
        return str(error)
    return None


def read_file(
    file: DatasetFile, config: DataConfig, spec: SpaceSpec | None, *, plan: FilePlan | None = None
) -> pa.Table:
    """The checked episodes of one file, or, under a plan that joins, its fragments; actions in the environment's units.

    Raises:
        DataError: the file is unreadable or empty, or has faults: each named by file, episode and step.
    """
    labels: Mapping[int, str] = {}
    if flat := has_rows(file):
        rows, names = read_rows(file, config)
        table, labels = cut_fragments(
            rows,
            names,
            ids=None if plan is None else plan.ids,
            joins=plan is not None and plan.joins,
            file_index=file.index,
            time_limit=config.time_limit,
            source=file.path,
        )
    elif config.columns:
        raise DataError(
            f"{file.path} holds whole episodes, whose columns have names of their own: leave out data.columns "
            f"(--column), got {', '.join(sorted(config.columns))}"
        )
    else:
        data = read_minari(file) if file.format == "minari" else from_table(read_parquet(file), source=file.path)
        table = to_table(data.with_time_limit(config.time_limit))
    if not len(table):
        raise DataError(f"{file.path} is empty: there is no episode in it")
    bounds = (spec.action_low, spec.action_high) if spec is not None and config.out_of_bounds == "clip" else None
    table = scale_actions(table, config.action_scale, bounds=bounds)
    hint = SCALE_HINT if flat else ""
    raise_faults(from_table(table, source=file.path), spec, source=file.path, hint=hint, labels=labels)
    if plan is None:
        table = _number(table, file)
    return mark_source(table, file.source) if config.mix else table


def _number(table: pa.Table, file: DatasetFile) -> pa.Table:
    """The table with an id of its own for each episode."""
    ids = table["episode_id"].to_numpy()
    numbers = numbers_in_file(ids, file.index) if file.is_numbered else unique_ids(ids)
    at = table.schema.get_field_index("episode_id")
    return table if numbers is ids else table.set_column(at, table.schema.field(at), pa.array(numbers))


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
    plans = make_plans(files, config, lambda files: [look_into(file, config) for file in files])
    tables = [read_file(file, config, spec, plan=plan) for file, plan in zip(files, plans, strict=True)]
    check_alike({file.path: table.schema for file, table in zip(files, tables, strict=True)})
    warn_of(_doubt(table) for table in tables if plans[0] is None)
    table = pa.concat_tables(tables)
    if (first := plans[0]) is not None and first.joins:
        table = join_fragments(table, time_limit=config.time_limit, labels=first.labels)
    return from_table(table, source=config.paths[0])


def make_plans(
    files: Sequence[DatasetFile], config: DataConfig, look: Callable[[Sequence[DatasetFile]], list[FileEpisodes]]
) -> Sequence[FilePlan | None]:
    """How the episodes of several files with a row per step go together; None where each file says it by itself.

    Raises:
        DataError: files of both kinds, or timesteps that don't go together.
    """
    if not check_schemas(files, config) or len(files) == 1:
        return [None] * len(files)
    looks = look(files)
    warn_of([found.doubt for found in looks])
    return plan_files(files, looks, config.episodes_across_files)


def warn_of(doubts: Iterable[str | None]) -> None:
    """Logs the first of them, and how many there are."""
    if found := [doubt for doubt in doubts if doubt]:
        log.warning("%s%s", found[0], f"; so in {len(found)} files" if len(found) > 1 else "")


def _doubt(table: pa.Table) -> str | None:
    return read_metadata(table.schema).get("doubt")


def read_parts(config: DataConfig, spec: SpaceSpec | None = None) -> Iterator[TransitionDataset]:
    """The episodes of a dataset file by file, in this process; all at once where an episode may lie in several files.

    Raises:
        DataError: as `read_dataset`.
    """
    files = sound_files_here(config, spec)[0]
    if check_schemas(files, config):
        yield read_dataset(config, spec, files=files)
        return
    first: dict[str, pa.Schema] = {}
    doubts = []
    for file in files:
        table = read_file(file, config, spec)
        doubts.append(_doubt(table))
        first = first or {file.path: table.schema}
        check_alike(first | {file.path: table.schema})
        yield from_table(table, source=file.path)
    warn_of(doubts)


def check_schemas(files: Sequence[DatasetFile], config: DataConfig) -> bool:
    """Whether episodes may go on from file to file: in all of its files, or in none.

    Raises:
        DataError: it has files of both kinds.
    """
    flat = [is_flat(file, config) for file in files]
    if len(set(flat)) > 1:
        one, other = files[flat.index(True)].path, files[flat.index(False)].path
        raise DataError(f"{one} has a row per step but {other} a row per episode; a dataset has files of one kind")
    return flat[0]


def check_alike(schemas: Mapping[str, pa.Schema]) -> None:
    """Raises:
    DataError: two files hold observations or actions of different dimensions, or only one has returns-to-go.
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
    with_returns = [path for path, schema in schemas.items() if "returns_to_go" in schema.names]
    if with_returns and (without := [path for path in schemas if path not in with_returns]):
        raise DataError(
            f"{with_returns[0]} has a column of returns-to-go but {without[0]} has none; write it into all files or "
            f"none, or leave it out by data.columns.return_to_go=null"
        )


def raise_faults(
    data: TransitionDataset,
    spec: SpaceSpec | None,
    *,
    source: str,
    hint: str = "",
    labels: Mapping[int, str] | None = None,
) -> None:
    faults = list(islice(find_faults(data, spec, labels), SHOWN_FAULTS + 1))
    if faults:
        more = "\n  and more" if len(faults) > SHOWN_FAULTS else ""
        lines = "".join(f"\n  {fault}" for fault in faults[:SHOWN_FAULTS])
        raise DataError(f"{source} can't be trained on{hint}:{lines}{more}")

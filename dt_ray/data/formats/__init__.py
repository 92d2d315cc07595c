"""Logs in the formats that people have, read into rows with named columns, or into whole episodes."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import pyarrow as pa

from dt_ray.config.schema import DataConfig
from dt_ray.data.formats.containers import read_hdf5, read_npz
from dt_ray.data.formats.minari import read_minari
from dt_ray.data.formats.rllib import decode_rows, is_episodes, read_episodes, read_json
from dt_ray.data.formats.tables import flat_names, read_csv, read_parquet, read_schema
from dt_ray.data.formats.trajectories import read_trajectories
from dt_ray.data.logs.files import DatasetFile
from dt_ray.data.logs.identity import UNIT
from dt_ray.data.logs.names import ColumnNames, column_names
from dt_ray.errors import DataError

__all__ = ["has_rows", "is_flat", "read_minari", "read_rows"]

ARRAY_READERS = {"hdf5": read_hdf5, "npz": read_npz, "trajectories": read_trajectories}
NO_PARTITION = "__HIVE_DEFAULT_PARTITION__"


def has_rows(file: DatasetFile) -> bool:
    """Whether the file has a row per step, and not one per episode."""
    if file.format != "parquet":
        return file.format != "minari"
    schema = read_schema(file)
    ours = {"observations", "rewards", "episode_id"} <= set(schema.names)
    return not ours or not pa.types.is_nested(schema.field("rewards").type)


def is_flat(file: DatasetFile, config: DataConfig) -> bool:
    """Whether episodes may continue in other files; files of arrays hold whole ones unless a setting says otherwise."""
    if config.episode_per_file:
        return False
    if file.format in ARRAY_READERS:
        return config.episodes_across_files is True
    return has_rows(file)


def read_rows(
    file: DatasetFile,
    config: DataConfig,
    wanted: Sequence[str] | None = None,
    *,
    observations_too: Callable[[ColumnNames], bool] | None = None,
    num_rows: int | None = None,
) -> tuple[pa.Table, ColumnNames]:
    """The rows of a file in the known columns, or in the `wanted` ones of ours, and what it calls each of ours.

    `observations_too` says whether observations and next ones are wanted besides, where both are logged; of Parquet
    `num_rows` are enough.

    Raises:
        DataError: the file is damaged, or a needed column is not in it.
    """
    partitions = {name: value for name, value in file.partitions.items() if file.format != "lerobot"}
    names: dict[str, tuple[str, ...]] = {}

    def choose(available: Sequence[str]) -> list[str]:
        own = [name for name in available if name != UNIT]
        every = [*own, *(name for name in partitions if name not in own)]
        names.clear()
        names.update(column_names(every, config.columns, source=file.path))
        ours = list(names) if wanted is None else list(wanted)
        if "next_observation" in names and observations_too is not None and observations_too(names):
            ours += ["observation", "next_observation"]
        chosen = {column: None for name in ours for column in names.get(name, ()) if column in own}
        return [*chosen, *([UNIT] if UNIT in available else [])] or own[:1]

    if file.format in ARRAY_READERS:
        rows = ARRAY_READERS[file.format](file, config)
        rows = rows.select(choose(rows.column_names))
    elif file.format in ("parquet", "lerobot") and not is_episodes(schema := read_schema(file)):
        rows = decode_rows(read_parquet(file, choose(flat_names(schema)), num_rows=num_rows), source=file.path)
    else:
        rows = read_json(file, choose) if file.format == "rllib-json" else None
        if rows is None:
            rows = (read_csv if file.format == "csv" else read_episodes)(file)
            rows = rows.select(choose(rows.column_names))
    for name, value in partitions.items():
        if any(name in columns for columns in names.values()) and name not in rows.column_names:
            rows = rows.append_column(name, _partition(value, len(rows), f"{file.path}, {name}"))
    return rows, names


def _partition(value: str, num_rows: int, where: str) -> pa.Array:
    if value == NO_PARTITION:
        raise DataError(f"{where}: the folder's name gives no value")
    is_number = re.fullmatch(r"-?(0|[1-9]\d{0,17})", value)
    return pa.array([int(value) if is_number else value] * num_rows, pa.int64() if is_number else pa.string())

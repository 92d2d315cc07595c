"""Logs in the formats that people have, read into rows with named columns, or into whole episodes."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import pyarrow as pa

from dt_ray.config.schema import DataConfig
from dt_ray.data.formats.containers import read_hdf5, read_npz, scan_hdf5, scan_npz
from dt_ray.data.formats.lazy_arrays import SAYING, ScannedRows
from dt_ray.data.formats.minari import read_minari
from dt_ray.data.formats.rllib import decode_rows, is_episodes, read_episodes, read_json
from dt_ray.data.formats.tables import flat_names, read_csv, read_parquet, read_schema, scan_csv
from dt_ray.data.formats.trajectories import read_trajectories
from dt_ray.data.logs.files import DatasetFile
from dt_ray.data.logs.identity import UNIT
from dt_ray.data.logs.names import ColumnNames, column_names
from dt_ray.errors import DataError

__all__ = ["has_rows", "is_flat", "read_minari", "read_rows", "scan_rows"]

ARRAY_READERS = {"hdf5": read_hdf5, "npz": read_npz, "trajectories": read_trajectories}
ARRAY_SCANNERS = {"hdf5": scan_hdf5, "npz": scan_npz}
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

    `observations_too` says whether observations and next ones are wanted besides, where both are logged. Of
    Parquet, and of other large files, `num_rows` are enough.

    Raises:
        DataError: the file is damaged, or a needed column is not in it.
    """
    chosen = _ColumnChoice(file, config, wanted, observations_too)
    if file.format in ARRAY_READERS:
        options = {} if file.format == "trajectories" else {"num_rows": num_rows}
        rows = ARRAY_READERS[file.format](file, config, **options)
        rows = rows.select(chosen(rows.column_names))
    elif file.format in ("parquet", "lerobot") and not is_episodes(schema := read_schema(file)):
        rows = decode_rows(read_parquet(file, chosen(flat_names(schema)), num_rows=num_rows), source=file.path)
    else:
        rows = read_json(file, chosen) if file.format == "rllib-json" else None
        if rows is None:
            rows = read_csv(file, num_rows=num_rows) if file.format == "csv" else read_episodes(file)
            rows = rows.select(chosen(rows.column_names))
    return chosen.with_partitions(rows), chosen.names


def scan_rows(file: DatasetFile, config: DataConfig) -> ScannedRows | None:
    """The columns of a large file that say where episodes begin, read without the others.

    None: it can't be read by ranges of its rows.

    Raises:
        DataError: as `read_rows`.
    """
    chosen = _ColumnChoice(file, config, SAYING, None)
    if file.format in ARRAY_SCANNERS:
        scanned = ARRAY_SCANNERS[file.format](file, config)
        if scanned is None:
            return None
        named = [name for columns in scanned.names.values() for name in columns]
        chosen(list(dict.fromkeys([*named, *scanned.rows.column_names])))
    elif file.format == "csv":
        found = scan_csv(file, chosen)
        if found is None:
            return None
        scanned = ScannedRows(found.rows, {}, file.size / max(1, len(found.rows)), None, found.begins, found.schema)
    else:
        return None
    return scanned._replace(rows=chosen.with_partitions(scanned.rows), names=chosen.names)


class _ColumnChoice:
    """Chooses the columns to read among those that a file turns out to have; those of folders' names are added."""

    def __init__(
        self,
        file: DatasetFile,
        config: DataConfig,
        wanted: Sequence[str] | None,
        observations_too: Callable[[ColumnNames], bool] | None,
    ) -> None:
        self.file, self.config, self.wanted, self.observations_too = file, config, wanted, observations_too
        self.names: ColumnNames = {}
        self.partitions = {name: value for name, value in file.partitions.items() if file.format != "lerobot"}

    def __call__(self, available: Sequence[str]) -> list[str]:
        own = [name for name in available if name != UNIT]
        every = [*own, *(name for name in self.partitions if name not in own)]
        self.names = column_names(every, self.config.columns, source=self.file.path)
        ours = list(self.names) if self.wanted is None else list(self.wanted)
        if "next_observation" in self.names and self.observations_too is not None and self.observations_too(self.names):
            ours += ["observation", "next_observation"]
        chosen = {column: None for name in ours for column in self.names.get(name, ()) if column in own}
        return [*chosen, *([UNIT] if UNIT in available else [])] or own[:1]

    def with_partitions(self, rows: pa.Table) -> pa.Table:
        for name, value in self.partitions.items():
            if any(name in columns for columns in self.names.values()) and name not in rows.column_names:
                rows = rows.append_column(name, _partition(value, len(rows), f"{self.file.path}, {name}"))
        return rows


def _partition(value: str, num_rows: int, where: str) -> pa.Array:
    if value == NO_PARTITION:
        raise DataError(f"{where}: the folder's name gives no value")
    is_number = re.fullmatch(r"-?(0|[1-9]\d{0,17})", value)
    return pa.array([int(value) if is_number else value] * num_rows, pa.int64() if is_number else pa.string())

"""Logs in the formats that people have, read into rows, whose episodes may cross files, or into whole episodes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pyarrow as pa

from dt_ray.config import DataConfig
from dt_ray.data.files import DatasetFile
from dt_ray.data.formats.arrays import read_hdf5, read_npz
from dt_ray.data.formats.minari import read_minari
from dt_ray.data.formats.rllib import decode_rows, is_episodes, read_episodes, read_json
from dt_ray.data.formats.tables import read_csv, read_parquet, read_schema
from dt_ray.data.formats.trajectories import read_trajectories
from dt_ray.data.transitions import TransitionDataset

EPISODE_READERS: dict[str, Callable[[DatasetFile, DataConfig], TransitionDataset]] = {
    "hdf5": read_hdf5,
    "npz": read_npz,
    "minari": read_minari,
    "trajectories": read_trajectories,
}


def is_flat(file: DatasetFile) -> bool:
    """Whether the file has a row per step: all but files of whole episodes."""
    if file.format in EPISODE_READERS:
        return False
    if file.format != "parquet":
        return True
    schema = read_schema(file)
    ours = {"observations", "rewards", "episode_id"} <= set(schema.names)
    return not ours or not pa.types.is_nested(schema.field("rewards").type)


def row_names(file: DatasetFile) -> list[str]:
    """The columns of a flat file."""
    if file.format in ("parquet", "lerobot") and not is_episodes(schema := read_schema(file)):
        return schema.names
    return read_rows(file).column_names


def read_rows(file: DatasetFile, columns: Sequence[str] | None = None) -> pa.Table:
    """The rows of a flat file in the columns that it has, or in these."""
    if file.format == "csv":
        rows = read_csv(file)
    elif file.format == "rllib-json":
        rows = read_json(file)
    elif is_episodes(read_schema(file)):
        rows = read_episodes(file)
    else:
        rows = decode_rows(read_parquet(file, columns))
    return rows if columns is None else rows.select(list(columns))

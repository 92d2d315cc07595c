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


def read_rows(file: DatasetFile, choose: Callable[[Sequence[str]], Sequence[str]]) -> pa.Table:
    """The rows of a flat file in the columns that `choose` takes of those that it has."""
    if file.format in ("parquet", "lerobot") and not is_episodes(schema := read_schema(file)):
        return decode_rows(read_parquet(file, choose(schema.names)))
    readers = {"csv": read_csv, "rllib-json": read_json}
    rows = readers.get(file.format, read_episodes)(file)
    return rows.select(list(choose(rows.column_names)))

"""Datasets as rows in files, and comparing them."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from dt_ray.config.schema import DataConfig
from dt_ray.data import TransitionDataset
from dt_ray.data.logs.episodes import to_table
from dt_ray.play.collection import flatten


def assert_same(left: TransitionDataset, right: TransitionDataset) -> None:
    for name in ("observations", "actions", "rewards", "terminated", "truncated", "starts", "episode_ids"):
        np.testing.assert_array_equal(getattr(left, name), getattr(right, name), err_msg=name)


def write_flat(data: TransitionDataset, folder: Path, *, num_files: int, drop: tuple[str, ...] = ()) -> DataConfig:
    """The rows in files of about equal size, episodes cut where a file ends."""
    rows = flatten(to_table(data)).drop_columns(list(drop))
    folder.mkdir(parents=True, exist_ok=True)
    edges = np.linspace(0, len(rows), num_files + 1).astype(int)
    for i, (begin, end) in enumerate(zip(edges, edges[1:], strict=False)):
        pq.write_table(rows.slice(begin, end - begin), folder / f"{i:03d}.parquet")
    return DataConfig(path=str(folder))

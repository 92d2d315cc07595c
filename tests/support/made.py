"""Functions that make Ray Datasets, for `data.path=support.made:NAME`."""

from __future__ import annotations

import pyarrow as pa
import ray.data

TABLES: list[pa.Table] = []  # the blocks that a test has set


def make() -> ray.data.Dataset:
    """A dataset of these blocks."""
    return ray.data.from_arrow(TABLES)


def fail() -> ray.data.Dataset:
    raise ConnectionError("no database at 10.0.0.1")


def break_down() -> ray.data.Dataset:
    """A dataset whose rows can't be read."""

    def look(rows: pa.Table) -> pa.Table:
        raise ValueError("no such sensor")

    return ray.data.range(3).map_batches(look, batch_format="pyarrow")


def make_nothing() -> list[int]:
    return [1, 2, 3]

"""The dataset on disk: Parquet with one row per episode, so that no block boundary can ever cut an episode."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy import ndarray

from dt_ray.data.logs.columns import one_array
from dt_ray.data.logs.ends import read_flags
from dt_ray.data.logs.ids import read_ids
from dt_ray.data.transitions import TransitionDataset
from dt_ray.errors import DataError

FORMAT_VERSION = 1
METADATA_KEY = b"dt_ray"
BRACKETS = str.maketrans("[]()", "    ")
STEP_COLUMNS = ("observations", "actions", "rewards")


def episode_schema(
    observation_dim: int, action_dim: int, metadata: Mapping[str, Any] | None = None, *, with_returns: bool = False
) -> pa.Schema:
    """The columns of an episode table; `metadata` joins the format version and the dimensions in the file."""
    facts = {"format_version": FORMAT_VERSION, "observation_dim": observation_dim, "action_dim": action_dim}
    observation = pa.list_(pa.float32(), observation_dim)
    return pa.schema(
        [
            ("episode_id", pa.int64()),
            ("observations", pa.list_(observation)),
            ("actions", pa.list_(pa.list_(pa.float32(), action_dim))),
            ("rewards", pa.list_(pa.float32())),
            ("terminated", pa.bool_()),
            ("truncated", pa.bool_()),
            ("next_observation", observation),
            *([("returns_to_go", pa.list_(pa.float32()))] if with_returns else []),
        ],
        metadata={METADATA_KEY: json.dumps({**facts, **(metadata or {})})},
    )


def read_metadata(schema: pa.Schema) -> dict[str, Any]:
    """What `episode_schema` wrote into the file; empty for other files."""
    metadata: dict[bytes, bytes] = schema.metadata or {}
    return json.loads(metadata.get(METADATA_KEY, b"{}"))


def to_table(data: TransitionDataset, metadata: Mapping[str, Any] | None = None) -> pa.Table:
    """One row per episode."""
    to_go = data.returns_to_go
    schema = episode_schema(data.observations.shape[1], data.actions.shape[1], metadata, with_returns=to_go is not None)
    offsets = pa.array(np.append(data.starts, data.num_transitions).astype(np.int32))
    last = data.ends - 1
    finals = data.final_observations
    if finals is None:
        next_observation = pa.nulls(data.num_episodes, schema.field("next_observation").type)
    else:
        unknown = pa.array(np.isnan(finals).all(axis=1))
        next_observation = pa.FixedSizeListArray.from_arrays(_flat(finals), finals.shape[1], mask=unknown)
    return pa.Table.from_arrays(
        [
            pa.array(data.episode_ids.astype(np.int64)),
            pa.ListArray.from_arrays(offsets, _vectors(data.observations)),
            pa.ListArray.from_arrays(offsets, _vectors(data.actions)),
            pa.ListArray.from_arrays(offsets, _flat(data.rewards)),
            pa.array(data.terminated[last]),
            pa.array(data.truncated[last]),
            next_observation,
            *([] if to_go is None else [pa.ListArray.from_arrays(offsets, _flat(to_go))]),
        ],
        schema=schema,
    )


def from_table(table: pa.Table, *, source: str) -> TransitionDataset:
    """The episodes of a table, without a copy where Arrow's memory allows it.

    Raises:
        DataError: a column is missing or of the wrong type, or an episode is empty or has columns of different lengths.
    """
    missing = [
        name for name in ("episode_id", *STEP_COLUMNS, "terminated", "truncated") if name not in table.column_names
    ]
    if missing:
        raise DataError(f"{source}: no column {', '.join(missing)}; it has {', '.join(table.column_names)}")
    ids = episode_ids_of(table, source=source)
    has_returns = "returns_to_go" in table.column_names
    lists = {name: one_array(table[name]) for name in (*STEP_COLUMNS, *(["returns_to_go"] if has_returns else []))}
    lengths = {name: _lengths(column, name, source) for name, column in lists.items()}
    for name in lists:
        wrong = np.flatnonzero((lengths[name] != lengths["rewards"]) | (lengths[name] == 0))
        if len(wrong):
            at = wrong[0]
            raise DataError(
                f"{source}, episode {ids[at]}: {lengths[name][at]} {name} for {lengths['rewards'][at]} rewards; "
                f"an episode needs at least one step, and one of each for every step"
            )
    ends = np.cumsum(lengths["rewards"])
    starts = ends - lengths["rewards"]
    flags = {name: np.zeros(ends[-1] if len(ends) else 0, dtype=bool) for name in ("terminated", "truncated")}
    for name, column in flags.items():
        column[ends - 1] = read_flags(table[name], f"{source}, column {name}", name)
    observations = vectors_of(lists["observations"].flatten(), f"{source}, observations")
    finals = None
    if "next_observation" in table.column_names and (column := table["next_observation"]).null_count < len(table):
        finals = np.full((len(table), observations.shape[1]), np.nan, np.float32)
        finals[column.is_valid().to_numpy()] = vectors_of(one_array(column.drop_null()), f"{source}, next_observation")
    return TransitionDataset(
        observations=observations,
        actions=vectors_of(lists["actions"].flatten(), f"{source}, actions"),
        rewards=_one_number(lists["rewards"].flatten(), f"{source}, rewards"),
        starts=starts.astype(np.int64),
        episode_ids=ids,
        returns_to_go=_one_number(lists["returns_to_go"].flatten(), f"{source}, returns_to_go")
        if has_returns
        else None,
        final_observations=finals,
        **flags,
    )


def episode_ids_of(table: pa.Table, *, source: str) -> ndarray:
    """The ids of a table's episodes as numbers, which sort as they do.

    Raises:
        DataError: a missing id, or one that is neither a whole number, a text nor a date.
    """
    found = read_ids(table, {"episode_id": ("episode_id",)}, source=source)
    assert found is not None
    return found.numbers


def vectors_of(column: pa.Array | pa.ChunkedArray, where: str) -> ndarray:
    """[rows, dimension] float32 from a column of vectors, also as texts, or of single numbers (dimension 1).

    A missing number is NaN: who checks the episodes names it by episode and step.

    Raises:
        DataError: missing vectors, vectors of different dimensions, or no numbers.
    """
    if isinstance(column, pa.ChunkedArray):
        column = one_array(column)
    if isinstance(column, pa.ExtensionArray):
        column = column.storage
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    kind = column.type
    if _holds_numbers(kind):
        return _numbers(column)[:, None]
    if column.null_count:
        row = int(np.argmax(column.is_null().to_numpy(zero_copy_only=False)))
        raise DataError(f"{where}: {column.null_count} missing value(s), the first in row {row}; every step needs one")
    if pa.types.is_list_view(kind) or pa.types.is_large_list_view(kind):
        column = column.cast(pa.large_list(kind.value_type))
        kind = column.type
    if pa.types.is_fixed_size_list(kind):
        dimension = kind.list_size
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind):
        lengths = column.value_lengths().to_numpy(zero_copy_only=False)
        dimension = int(lengths[0]) if len(lengths) else 0
        if (lengths != dimension).any():
            raise DataError(f"{where}: vectors of different dimensions {np.unique(lengths).tolist()}")
    elif pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return _parse_vectors(column.to_pylist(), where)
    else:
        raise DataError(f"{where}: expected numbers, found {kind}")
    values = vectors_of(column.flatten(), where)  # deeper lists of one number each are that number
    if len(values) and values.shape[1] != 1:
        inner = values.shape[1]
        if dimension != 1:
            raise DataError(f"{where}: {dimension} x {inner} numbers a step; dt_ray trains on one vector for each step")
        return values
    return values.reshape(-1, dimension) if dimension else np.zeros((len(column), 0), np.float32)


def _parse_vectors(texts: Sequence[str], where: str) -> ndarray:
    """Vectors written as `[1, 2]`, `(1 2)` or `1 2`."""
    rows: list[list[float]] = []
    for row, text in enumerate(texts):
        try:
            rows.append([float(part) for part in text.translate(BRACKETS).replace(",", " ").split()])
        except ValueError:  # noqa: PERF203
            raise DataError(f"{where}: expected numbers, found {text[:40]!r} in row {row}") from None
    dimensions = sorted({len(row) for row in rows})
    if len(dimensions) > 1:
        raise DataError(f"{where}: vectors of different dimensions {dimensions}")
    return np.asarray(rows, np.float64).astype(np.float32).reshape(len(rows), *dimensions)


def _one_number(column: pa.Array, where: str) -> ndarray:
    values = vectors_of(column, where)
    if len(values) and values.shape[1] != 1:
        raise DataError(f"{where}: {values.shape[1]} numbers a step; it takes one")
    return values.reshape(-1)


def _holds_numbers(kind: pa.DataType) -> bool:
    return pa.types.is_floating(kind) or pa.types.is_integer(kind) or pa.types.is_decimal(kind)


def _numbers(column: pa.Array) -> ndarray:
    if pa.types.is_decimal(column.type):
        column = column.cast(pa.float64())
    with np.errstate(over="ignore"):  # what is too large becomes infinite, which is named with its step
        return column.to_numpy(zero_copy_only=False).astype(np.float32, copy=False)


def _lengths(column: pa.Array, name: str, source: str) -> ndarray:
    if not (pa.types.is_list(column.type) or pa.types.is_large_list(column.type)):
        raise DataError(f"{source}: column {name} must hold a list per episode, found {column.type}")
    return column.value_lengths().fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)


def _flat(values: ndarray) -> pa.Array:
    return pa.array(np.ascontiguousarray(values, dtype=np.float32).reshape(-1))


def _vectors(values: ndarray) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(_flat(values), values.shape[1])

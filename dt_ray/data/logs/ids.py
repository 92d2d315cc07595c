"""Reads the columns that say to which episode and step a row belongs: ids, timesteps and clocks.

Legend: N rows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Int
from numpy import ndarray

from dt_ray.data.logs.columns import one_array, plain_array
from dt_ray.data.logs.names import ColumnNames
from dt_ray.errors import DataError


class RowIds(NamedTuple):
    """The episode id of each row as a number; numbers are in the order of the logged ids."""

    numbers: Int[ndarray, "N"]
    texts: ndarray | None  # the logged ids by number, where these are no numbers

    def label(self, number: int | np.integer) -> str:
        return f"{number}" if self.texts is None else f"{self.texts[number]}"

    def of_row(self, row: Any) -> str:
        return self.label(self.numbers.item(int(row)))


def read_ids(rows: pa.Table, names: ColumnNames, *, source: str) -> RowIds | None:
    """The logged ids; several columns make one id together.

    Raises:
        DataError: a missing id, or one that is neither a whole number, a text nor a date.
    """
    columns = names.get("episode_id", ())
    found = [_read_id(rows[column], f"{source}, {column}") for column in columns]
    if not found:
        return None
    if len(found) == 1:
        return found[0]
    texts = [
        np.asarray([f"{number}" for number in each.numbers]) if each.texts is None else each.texts[each.numbers]
        for each in found
    ]
    numbers = np.lexsort([each.numbers for each in reversed(found)])
    changes = np.any([np.diff(each.numbers[numbers]) != 0 for each in found], axis=0)
    codes = np.empty(len(rows), np.int64)
    codes[numbers] = np.concatenate([[0], np.cumsum(changes)])[: len(rows)]
    labels = np.empty(int(codes.max(initial=-1)) + 1, object)
    labels[codes] = ["/".join(parts) for parts in zip(*texts, strict=True)]
    return RowIds(codes, labels)


def _read_id(column: pa.ChunkedArray | pa.Array, where: str) -> RowIds:
    column = plain_array(column)
    kind = column.type
    if column.null_count:
        raise DataError(f"{where} must be there at every step, {column.null_count} row(s) have none")
    if pa.types.is_fixed_size_list(kind) and kind.list_size == 1:
        return _read_id(column.flatten(), where)
    if pa.types.is_integer(kind) or pa.types.is_boolean(kind):
        values = column.to_numpy(zero_copy_only=False)
        if values.dtype == np.uint64 and (values > np.iinfo(np.int64).max).any():
            return _as_texts(column.cast(pa.string()))
        return RowIds(values.astype(np.int64), None)
    if pa.types.is_floating(kind):
        values: Float[ndarray, "N"] = column.to_numpy(zero_copy_only=False).astype(np.float64)
        is_whole = np.isfinite(values) & (values == np.round(values)) & (np.abs(values) < 2**53)
        if not is_whole.all():
            raise DataError(f"{where} must be a whole number or a text at every step, found {values[~is_whole][0]}")
        return RowIds(values.astype(np.int64), None)
    if pa.types.is_temporal(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return _as_texts(column.cast(pa.string()))
    if pa.types.is_string_view(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        try:
            return _as_texts(column.cast(pa.string()))
        except pa.ArrowException:
            pass
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind):
        return _as_texts(pa.array([value.hex() for value in column.to_pylist()], pa.string()))
    raise DataError(f"{where} must be a whole number or a text at every step, found {kind}")


def _as_texts(column: pa.Array) -> RowIds:
    encoded = column.dictionary_encode()
    texts = np.asarray(encoded.dictionary.to_pylist(), object)
    order = np.argsort(texts, kind="stable")
    ranks = np.empty(len(order), np.int64)
    ranks[order] = np.arange(len(order))
    return RowIds(ranks[np.asarray(encoded.indices)], texts[order])


def read_times(rows: pa.Table, names: ColumnNames, *, source: str) -> Float[ndarray, "N"] | None:
    """The logged timesteps, or the times of a clock.

    Raises:
        DataError: a missing time, or one that is no number.
    """
    if "timestep" not in names:
        return None
    (name,) = names["timestep"]
    column, where = one_array(rows[name]), f"{source}, {name}"
    if pa.types.is_fixed_size_list(column.type) and column.type.list_size == 1:
        column = column.flatten()
    remedy = "; data.columns.timestep=null ignores the column"
    if column.null_count:
        raise DataError(f"{where}: {column.null_count} missing value(s){remedy}")
    kind = column.type
    if pa.types.is_temporal(kind):
        column = column.cast(pa.int32()) if kind.bit_width == 32 else column
        column = column.cast(pa.int64())
    elif not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
        raise DataError(f"{where}: {kind} is no number or time{remedy}")
    times = column.to_numpy(zero_copy_only=False).astype(np.float64)
    if not np.isfinite(times).all():
        raise DataError(f"{where}: {times[~np.isfinite(times)][0]} is no step{remedy}")
    return times

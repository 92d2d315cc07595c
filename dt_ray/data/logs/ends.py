"""Where episodes end, by all columns that mark an end, and how, by the most specific of these columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import Bool
from numpy import ndarray

from dt_ray.data.logs.columns import plain_array
from dt_ray.data.logs.names import SIGNALS, ColumnNames
from dt_ray.errors import DataError

YES, NO = ("true", "t", "yes", "y", "1", "1.0"), ("false", "f", "no", "n", "0", "0.0")
FIRST, MIDDLE, LAST = ("0", "first"), ("1", "mid"), ("2", "last")  # of dm_env's step types


class Ends(NamedTuple):
    """For each row of a file, in its order, whether an episode ends there."""

    terminated: Bool[ndarray, "N"]
    truncated: Bool[ndarray, "N"]
    starts: Bool[ndarray, "N"] | None  # where a column marks the first steps of episodes
    are_logged: bool

    @property
    def ended(self) -> Bool[ndarray, "N"]:
        return self.terminated | self.truncated


def read_ends(rows: pa.Table, names: ColumnNames, *, source: str) -> Ends:
    """The ends that any column marks.

    A step that is marked as terminal is one, whatever other columns say. A step that is marked as `done` is a
    truncation if a column of truncations marks it, or if there is a column of terminals that does not; otherwise it is
    a terminal. A step that is marked as the last one is a truncation unless another column marks it as a terminal.

    Raises:
        DataError: a value that is neither true nor false.
    """

    def any_of(name: str) -> ndarray | None:
        flags = [read_flags(rows[each], f"{source}, column {each}", name) for each in names.get(name, ())]
        return np.logical_or.reduce(flags) if flags else None

    nowhere = np.zeros(len(rows), bool)
    terminal, cut, done, last, starts = map(any_of, SIGNALS[:5])
    for column in names.get("step_type", ()):
        first_steps, last_steps = _step_types(rows[column], f"{source}, column {column}")
        starts = first_steps if starts is None else starts | first_steps
        last = last_steps if last is None else last | last_steps
    terminated = nowhere if terminal is None else terminal
    truncated = nowhere if cut is None else cut & ~terminated
    if done is not None:
        unspecific = done & ~terminated & ~truncated
        if terminal is None:
            terminated = terminated | unspecific
        else:
            truncated = truncated | unspecific
    if last is not None:
        truncated = truncated | (last & ~terminated)
    logged = any(each is not None for each in (terminal, cut, done, last))
    return Ends(terminated, truncated, starts, logged)


def read_flags(column: pa.ChunkedArray | pa.Array, where: str, name: str) -> Bool[ndarray, "N"]:
    """True and false, however they are written.

    Raises:
        DataError: missing values, or values that are neither.
    """
    column = _one_number_a_row(column)
    remedy = f"; it takes true and false, yes and no, 1 and 0: mend it, or leave it out by data.columns.{name}=null"
    if column.null_count:
        row = int(np.argmax(np.asarray(column.is_null())))
        raise DataError(f"{where}: {column.null_count} missing value(s), the first in row {row}{remedy}")
    if pa.types.is_boolean(column.type):
        return column.to_numpy(zero_copy_only=False)
    if pa.types.is_integer(column.type) or pa.types.is_floating(column.type):
        values = column.to_numpy(zero_copy_only=False)
        known, flags = (values == 0) | (values == 1), values == 1
    elif _is_text(column.type):
        texts = _Texts.of(column)
        flags, known = texts.among(YES), texts.among((*YES, *NO))
    else:
        raise DataError(f"{where} holds {column.type}{remedy}")
    if not known.all():
        row = int(np.argmin(known))
        raise DataError(f"{where}: {column[row].as_py()!r} in row {row}{remedy}")
    return flags.astype(bool)


def _step_types(column: pa.ChunkedArray, where: str) -> tuple[ndarray, ndarray]:
    column = _one_number_a_row(column)
    if pa.types.is_integer(column.type):
        column = column.cast(pa.string())
    texts = _Texts.of(column) if _is_text(column.type) and not column.null_count else None
    if texts is None or not texts.among((*FIRST, *MIDDLE, *LAST)).all():
        raise DataError(f"{where}: step types are 0, 1 and 2, or FIRST, MID and LAST; data.columns.step_type=null")
    return texts.among(FIRST), texts.among(LAST)


class _Texts(NamedTuple):
    """A column with few different texts, in lower case and without blanks around them."""

    values: list[str]
    rows: ndarray  # of `values`

    @classmethod
    def of(cls, column: pa.Array) -> _Texts:
        encoded = column.cast(pa.string()).dictionary_encode()
        return cls([text.strip().lower() for text in encoded.dictionary.to_pylist()], np.asarray(encoded.indices))

    def among(self, texts: Sequence[str]) -> Bool[ndarray, "N"]:
        return np.asarray([value in texts for value in self.values], bool)[self.rows]


def _one_number_a_row(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    column = plain_array(column)
    while pa.types.is_fixed_size_list(column.type) or pa.types.is_list(column.type):
        flat = column.flatten()
        if column.null_count or len(flat) != len(column):
            break
        column = flat
    return column


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)

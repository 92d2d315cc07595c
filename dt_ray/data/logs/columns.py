"""Arrow columns as single arrays."""

from __future__ import annotations

import pyarrow as pa


def one_array(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    """A column in one piece, copied only where it has several."""
    if isinstance(column, pa.Array):
        return column
    if column.num_chunks == 1:
        return column.chunk(0)  # which combining would copy
    array = column.combine_chunks()
    return pa.concat_arrays(array.chunks) if isinstance(array, pa.ChunkedArray) else array


def plain_array(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    """A column in one piece, out of extension types and dictionaries."""
    array = one_array(column)
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    return array.dictionary_decode() if pa.types.is_dictionary(array.type) else array

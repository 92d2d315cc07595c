"""Tables with a row per step: Parquet (RLlib's and LeRobot's too) and CSV in its dialects."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from dt_ray.data.logs.files import Block, DatasetFile
from dt_ray.errors import DataError

SEPARATORS = ",;\t|"


def read_schema(file: DatasetFile) -> pa.Schema:
    if file.block is not None:
        return file.block.schema
    with file.open() as stream:
        return pq.read_schema(stream)


def flat_names(schema: pa.Schema) -> list[str]:
    """The names of all columns, those inside of structs as `outer.inner`."""
    return [name for field in schema for name in _names_in(field.name, field.type)]


def _names_in(name: str, kind: pa.DataType) -> Iterator[str]:
    if not pa.types.is_struct(kind):
        yield name
        return
    for i in range(kind.num_fields):
        yield from _names_in(f"{name}.{kind.field(i).name}", kind.field(i).type)


def read_parquet(file: DatasetFile, columns: Sequence[str] | None = None, *, num_rows: int | None = None) -> pa.Table:
    """The rows, or the first `num_rows` of them."""
    if file.block is not None:
        return _of_block(file.block, columns, num_rows)
    with file.open() as stream:
        # The file's own schema, so that no reader guesses types (extension types of other libraries among them).
        parquet = pq.ParquetFile(stream, page_checksum_verification=True)
        wanted = None if columns is None else list(columns)
        if num_rows is not None:
            first = next(parquet.iter_batches(batch_size=num_rows, columns=wanted), None)
            rows = parquet.schema_arrow.empty_table() if first is None else pa.Table.from_batches([first])
        elif file.row_groups is None:
            rows = parquet.read(wanted)
        else:
            rows = parquet.read_row_groups(file.row_groups, wanted)
    return _flattened(rows)


def _of_block(block: Block, columns: Sequence[str] | None, num_rows: int | None) -> pa.Table:
    rows = _flattened(block.load().slice(0, num_rows))
    return rows if columns is None else rows.select(list(columns))


def _flattened(rows: pa.Table) -> pa.Table:
    while any(pa.types.is_struct(field.type) for field in rows.schema):
        rows = rows.flatten()
    return rows


def read_csv(file: DatasetFile) -> pa.Table:
    """The rows, whatever separates the columns; with semicolons between them numbers may have decimal commas."""
    with file.open() as stream:
        content = stream.read_buffer()
        if file.path.lower().endswith(".gz"):
            content = pa.CompressedInputStream(pa.BufferReader(content), "gzip").read_buffer()
        start = content.slice(0, min(content.size, 2**16)).to_pybytes()
        lines = [line for line in start.decode("utf-8", "replace").splitlines() if line.strip()]
        if not lines:
            raise DataError(f"{file.path} is not a readable CSV file: it is empty")
        rows = start.partition(b"\n")[2]  # quotes in the header alone need no slower reader
        header = re.sub(r'"[^"]*"', "", lines[0])
        separator = max(SEPARATORS, key=header.count)
        comma = separator == ";" and any(re.search(r"\d,\d", each) and "." not in each for each in lines[1:2])
        options = {
            "parse_options": pyarrow.csv.ParseOptions(delimiter=separator, newlines_in_values=b'"' in rows),
            "convert_options": pyarrow.csv.ConvertOptions(decimal_point="," if comma else "."),
        }
        try:
            start.partition(b"\n")[0].decode()
        except UnicodeDecodeError:
            raise DataError(f"{file.path} is not a readable CSV file: its names are not written in UTF-8") from None
        try:
            return pyarrow.csv.read_csv(pa.BufferReader(content), **options)
        except pa.ArrowInvalid:  # a column of whole numbers may go on with others: all rows say what it holds
            whole = pyarrow.csv.ReadOptions(block_size=min(max(content.size, 2**20), 2**31 - 1))
            return pyarrow.csv.read_csv(pa.BufferReader(content), read_options=whole, **options)

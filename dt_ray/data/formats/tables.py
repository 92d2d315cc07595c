"""Tables with a row per step: Parquet (RLlib's and LeRobot's too) and CSV in its dialects."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from dt_ray.data.logs.files import Block, DatasetFile, RowRange
from dt_ray.errors import DataError

SEPARATORS = ",;\t|"
START_BYTES = 2**16  # of a CSV file, which show how it is written
BLOCK_BYTES = 2**24  # of a large CSV file that are read at a time


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


def read_csv(file: DatasetFile, *, num_rows: int | None = None) -> pa.Table:
    """The rows, whatever separates the columns; with semicolons between them numbers may have decimal commas.

    Of a large file the first block is read where `num_rows` are enough, and it has them.
    """
    is_zipped = file.path.lower().endswith(".gz")
    with file.open() as stream:
        if not is_zipped and file.rows is not None:
            return _read_range(stream, file.rows, path=file.path)
        if not is_zipped and num_rows is not None and file.is_large:
            content, is_whole = _next_block(stream)
            if is_whole and len(rows := _parse(content, _Dialect.of(_start_of(content), path=file.path))) >= num_rows:
                return rows
            stream.seek(0)
        content = stream.read_buffer()
        if is_zipped:
            content = pa.CompressedInputStream(pa.BufferReader(content), "gzip").read_buffer()
        return _parse(content, _Dialect.of(_start_of(content), path=file.path))


def scan_csv(file: DatasetFile, choose: Callable[[Sequence[str]], Sequence[str]]) -> CsvBlocks | None:
    """The rows in the columns that `choose` takes, read block by block; None: the file has to be read whole."""
    if file.path.lower().endswith(".gz"):
        return None
    begins: list[tuple[int, int]] = []
    tables: list[pa.Table] = []
    schema: pa.Schema | None = None
    begin = row = 0
    with file.open() as stream:
        dialect = _Dialect.of(stream.read(START_BYTES), path=file.path)
        stream.seek(0)
        while begin < file.size:
            content, is_whole = _next_block(stream)
            if not is_whole:
                return None
            block = _parse(content, dialect, names=None if schema is None else schema.names)
            schema = block.schema if schema is None else _common_schema(schema, block.schema)
            if schema is None or len(set(schema.names)) < len(schema.names):
                return None
            begins.append((begin, row))
            tables.append(block.select(list(choose(schema.names))))
            begin, row = begin + content.size, row + len(block)
    if schema is None:
        return None
    chosen = pa.schema([schema.field(name) for name in choose(schema.names)])
    try:
        rows = pa.concat_tables([table.cast(chosen) for table in tables])
    except pa.ArrowInvalid:  # whole numbers that are too large for floats
        return None
    return CsvBlocks(rows, [*begins, (begin, row)], schema)


class CsvBlocks(NamedTuple):
    rows: pa.Table
    begins: list[tuple[int, int]]  # the byte and the row at which each block begins; and the file's end
    schema: pa.Schema


class _Dialect(NamedTuple):
    """How the values of a CSV file are written."""

    separator: str
    has_quotes: bool  # in the rows: then a value may go on in the next line
    has_decimal_commas: bool

    @classmethod
    def of(cls, start: bytes, *, path: str) -> _Dialect:
        lines = [line for line in start.decode("utf-8", "replace").splitlines() if line.strip()]
        if not lines:
            raise DataError(f"{path} is not a readable CSV file: it is empty")
        rows = start.partition(b"\n")[2]  # quotes in the header alone need no slower reader
        header = re.sub(r'"[^"]*"', "", lines[0])
        separator = max(SEPARATORS, key=header.count)
        comma = separator == ";" and any(re.search(r"\d,\d", each) and "." not in each for each in lines[1:2])
        try:
            start.partition(b"\n")[0].decode()
        except UnicodeDecodeError:
            raise DataError(f"{path} is not a readable CSV file: its names are not written in UTF-8") from None
        return cls(separator, b'"' in rows, comma)


def _start_of(content: pa.Buffer) -> bytes:
    return content.slice(0, min(content.size, START_BYTES)).to_pybytes()


def _next_block(stream: pa.NativeFile) -> tuple[pa.Buffer, bool]:
    """The whole rows in the next `BLOCK_BYTES`, or the rest; and whether it ends with a row's end, or the file's."""
    begin = stream.tell()
    content = stream.read_buffer(BLOCK_BYTES)
    if begin + content.size == stream.size():
        return content, True
    text = content.to_pybytes()
    length = text.rfind(b"\n") + 1
    while length and text.count(b'"', 0, length) % 2:  # inside of a quoted value
        length = text.rfind(b"\n", 0, length - 1) + 1
    stream.seek(begin + length)
    return content.slice(0, length), length > 0


def _parse(
    content: pa.Buffer, dialect: _Dialect, *, names: Sequence[str] | None = None, schema: pa.Schema | None = None
) -> pa.Table:
    """The rows; with `names` there is no line of names, with a `schema` the types are known."""
    options = {
        "parse_options": pyarrow.csv.ParseOptions(delimiter=dialect.separator, newlines_in_values=dialect.has_quotes),
        "convert_options": pyarrow.csv.ConvertOptions(
            decimal_point="," if dialect.has_decimal_commas else ".",
            column_types=None if schema is None else dict(zip(schema.names, schema.types, strict=True)),
        ),
    }
    read = partial(pyarrow.csv.ReadOptions, column_names=None if names is None else list(names))
    try:
        return pyarrow.csv.read_csv(pa.BufferReader(content), read_options=read(), **options)
    except pa.ArrowInvalid:  # a column of whole numbers may go on with others: all rows say what it holds
        size = min(max(content.size, 2**20), 2**31 - 1)
        return pyarrow.csv.read_csv(pa.BufferReader(content), read_options=read(block_size=size), **options)


def _read_range(stream: pa.NativeFile, rows: RowRange, *, path: str) -> pa.Table:
    assert rows.text is not None
    assert rows.schema is not None
    begin, end, skip = rows.text
    dialect = _Dialect.of(stream.read(START_BYTES), path=path)
    stream.seek(begin)
    names = rows.schema.names if begin else None  # the line of names is in the first block
    table = _parse(stream.read_buffer(end - begin), dialect, names=names, schema=rows.schema)
    return table.slice(skip, rows.num_rows)


def _common_schema(one: pa.Schema, other: pa.Schema) -> pa.Schema | None:
    """The types that all rows of two blocks have when they are read together; None where only reading them tells."""
    fields: list[pa.Field] = []
    for before, after in zip(one, other, strict=True):
        kinds = [kind for kind in dict.fromkeys((before.type, after.type)) if not pa.types.is_null(kind)]
        if len(kinds) == 2 and set(kinds) != {pa.int64(), pa.float64()}:
            return None
        kind = pa.float64() if len(kinds) == 2 else (kinds or [pa.null()])[0]
        fields.append(pa.field(before.name, kind))
    return pa.schema(fields)

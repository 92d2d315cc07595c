"""Tables with a row per step: Parquet (RLlib's and LeRobot's too) and CSV."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from dt_ray.data.files import DatasetFile


def read_schema(file: DatasetFile) -> pa.Schema:
    with file.open() as stream:
        return pq.read_schema(stream)


def read_parquet(file: DatasetFile, columns: Sequence[str] | None = None) -> pa.Table:
    with file.open() as stream:
        # The file's own schema, so that no reader guesses types (extension types of other libraries among them).
        parquet = pq.ParquetFile(stream, page_checksum_verification=True)
        wanted = None if columns is None else list(columns)
        return parquet.read(wanted) if file.row_groups is None else parquet.read_row_groups(file.row_groups, wanted)


def read_csv(file: DatasetFile) -> pa.Table:
    with file.open() as stream:
        return pyarrow.csv.read_csv(stream)

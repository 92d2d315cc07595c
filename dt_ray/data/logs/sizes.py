"""How much memory a dataset takes once it is read: 4 bytes for each number of its steps, however small its files are.

Only headers, footers and the first bytes of files are read. Of many files only some are read, and the size of the
others is estimated from them.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dt_ray.config.schema import DataConfig
from dt_ray.data.formats import has_rows
from dt_ray.data.formats.rllib import is_episodes, numbers_in_line
from dt_ray.data.formats.tables import SEPARATORS
from dt_ray.data.logs.files import DatasetFile
from dt_ray.data.logs.looks import read_shape_of

FLOAT_BYTES = 4
MAX_FILES = 64  # that are looked at
SAMPLE_BYTES = 2**20  # of a text file


def decoded_size(files: Sequence[DatasetFile], config: DataConfig) -> int:
    """The approximate number of bytes that the steps of these files take in memory.

    Raises:
        DataError: a file can't be read.
    """
    if files[0].block is not None:
        return sum(file.size for file in files)
    number = min(len(files), MAX_FILES)
    places: list[int] = np.linspace(0, len(files) - 1, number).astype(int).tolist()
    looked_at = [files[at] for at in places]
    width = _step_width(looked_at[0], config)
    found = sum(_numbers_in(file, width) for file in looked_at) * FLOAT_BYTES
    if number == len(files):
        return int(found)
    return int(found / max(1, sum(file.size for file in looked_at)) * sum(file.size for file in files))


def _step_width(file: DatasetFile, config: DataConfig) -> int | None:
    """Numbers of a step that is trained on, where the file's first rows tell."""
    if not _is_table(file):
        return None
    return sum(read_shape_of(file, config).dimensions) + 1


def _is_table(file: DatasetFile) -> bool:
    if file.format not in ("parquet", "lerobot"):
        return False
    with file.open() as stream:
        return not is_episodes(pq.read_schema(stream))


def _numbers_in(file: DatasetFile, width: int | None) -> float:
    if file.format in ("parquet", "lerobot"):
        return _in_parquet(file, width)
    known: dict[str, Callable[[DatasetFile], float]] = {
        "npz": _in_npz,
        "hdf5": _in_hdf5,
        "minari": _in_minari,
        "csv": _in_csv,
        "rllib-json": _in_json,
    }
    return known[file.format](file) if file.format in known else file.size / FLOAT_BYTES  # pickles are not compressed


def _in_parquet(file: DatasetFile, width: int | None) -> float:
    with file.open() as stream:
        metadata = pq.read_metadata(stream)
    groups = range(metadata.num_row_groups) if file.row_groups is None else file.row_groups
    if width is None:  # packed by another library
        return sum(metadata.row_group(group).total_byte_size for group in groups) / FLOAT_BYTES
    if has_rows(file):
        return width * sum(metadata.row_group(group).num_rows for group in groups)
    columns = [metadata.schema.column(at).path.split(".")[0] for at in range(metadata.num_columns)]
    rewards = columns.index("rewards")
    return width * sum(metadata.row_group(group).column(rewards).num_values for group in groups)


def _in_npz(file: DatasetFile) -> float:
    with file.open() as stream:
        try:
            return sum(_in_array(member) for member in _members(stream))
        except (zipfile.BadZipFile, ValueError):
            return file.size / FLOAT_BYTES  # damaged: reading it says how


def _members(stream: pa.NativeFile) -> list[tuple[int, ...]]:
    shapes: list[tuple[int, ...]] = []
    with zipfile.ZipFile(stream) as archive:  # type: ignore[arg-type]
        for name in archive.namelist():
            with archive.open(name) as member:
                version = np.lib.format.read_magic(member)
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                shapes.append(read(member)[0])
    return shapes


def _in_array(shape: tuple[int, ...]) -> float:
    return float(np.prod(shape)) if shape else 1.0


def _in_hdf5(file: DatasetFile) -> float:
    import h5py

    found: list[float] = []

    def count(name: str, node: Any) -> None:
        if isinstance(node, h5py.Dataset) and node.shape is not None:
            found.append(_in_array(node.shape))

    with file.open() as stream:
        try:
            with h5py.File(stream, "r") as content:
                content.visititems(count)
        except (OSError, RuntimeError):
            return file.size / FLOAT_BYTES  # damaged: reading it says how
    return sum(found)


def _in_minari(file: DatasetFile) -> float:
    """Exact for a dataset in one HDF5 file, estimated by size for others."""
    path = f"{file.path.rstrip('/')}/data/main_data.hdf5"
    if not file.filesystem.get_file_info(path).is_file:
        return file.size / FLOAT_BYTES
    return _in_hdf5(replace(file, path=path, format="hdf5"))


def _in_csv(file: DatasetFile) -> float:
    with file.open() as stream:
        is_compressed = file.path.lower().endswith(".gz")
        content = pa.CompressedInputStream(stream, "gzip") if is_compressed else stream
        sample = content.read(SAMPLE_BYTES)
        read = stream.tell() if is_compressed else len(sample)
    numbers = sum(sample.count(separator.encode()) for separator in SEPARATORS) + sample.count(b"\n")
    return numbers * file.size / max(1, min(read, file.size))


def _in_json(file: DatasetFile) -> float:
    with file.open() as stream:
        line = b""
        while not line.endswith(b"\n") and (more := stream.read(SAMPLE_BYTES)):
            line += more.partition(b"\n")[0] + b"\n" * (b"\n" in more)
    try:
        return numbers_in_line(json.loads(line)) * file.size / max(1, len(line))
    except (ValueError, RecursionError, TypeError, AttributeError):
        return file.size / FLOAT_BYTES  # damaged: reading it says how

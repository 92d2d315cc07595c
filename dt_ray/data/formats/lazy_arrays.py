"""Arrays of containers that are read by ranges of their rows, and the columns of them that say where episodes begin.

Legend: P parts of a container.
"""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import Int
from numpy import ndarray

from dt_ray.config.schema import DataConfig
from dt_ray.data.formats.arrays import Arrays, are_places, rows_of_parts
from dt_ray.data.logs.names import SIGNALS, ColumnNames, column_names

LOCAL_HEADER = struct.Struct("<26xHH")  # of a ZIP member: the lengths of its name and of its extra field
CHUNK_BYTES = 2**20
SAYING = ("episode_id", "timestep", *SIGNALS)  # where episodes begin; other columns are not read for that


# The place and the arrays of each part. An array may be on disk: `[()]` reads all of it, a slice some of its rows.
LazyParts = Sequence[tuple[str, Mapping[str, Any]]]


class ScannedRows(NamedTuple):
    """What says where episodes begin in a large file, and how to read parts of its rows."""

    rows: pa.Table  # of the columns that say so
    names: ColumnNames
    row_bytes: float  # that a row takes in memory
    part_begins: Int[ndarray, "P"] | None = None  # the first rows of a container's parts, where it has several
    blocks: Sequence[tuple[int, int]] | None = None  # of a text file: the byte and the row at which each block begins
    schema: pa.Schema | None = None  # of a text file


def whole(parts: LazyParts) -> list[tuple[str, Arrays]]:
    return [(place, {name: array[()] for name, array in arrays.items()}) for place, arrays in parts]


def first_rows(parts: LazyParts, config: DataConfig, num_rows: int) -> list[tuple[str, Arrays]]:
    """The first rows of the first part that has any; all of it where arrays have a leading axis of episodes."""
    for place, arrays in parts:
        roles = _roles(arrays, config)
        num = _num_rows(arrays, roles)
        if num != 0:
            return [(place, _slice(arrays, roles, 0, num_rows, num))] if num else whole([(place, arrays)])
    return whole(parts)


def range_of(
    parts: LazyParts, config: DataConfig, *, chosen: range | None, begin: int, num_rows: int
) -> list[tuple[str, Arrays]]:
    """Rows of the container's only part, or the chosen parts and, as the last of the rows, the first one after them."""
    if chosen is None:
        ((place, arrays),) = parts
        roles = _roles(arrays, config)
        num = _num_rows(arrays, roles)
        assert num is not None
        return [(place, _slice(arrays, roles, begin, begin + num_rows, num))]
    own = [parts[at] for at in chosen]
    missing = num_rows - sum(_num_rows(arrays, _roles(arrays, config)) or 0 for _, arrays in own)
    return whole(own) + (first_rows(parts[chosen.stop :], config, missing) if missing else [])


def scan_parts(parts: LazyParts, config: DataConfig, *, source: str, are_apart: bool | None) -> ScannedRows | None:
    """None: some array has another form than one entry for each row, and is read whole.

    Raises:
        DataError: as `rows_of_parts`.
    """
    lengths: list[int] = []  # of the parts
    kept: list[tuple[str, Arrays]] = []
    num_bytes = 0
    columns: dict[str, None] = {}
    names: ColumnNames = {}
    for place, arrays in parts:
        roles = _roles(arrays, config)
        num = _num_rows(arrays, roles)
        if num is None:
            return None
        read = {name: arrays[name][()] if role in SAYING else _stand_in(arrays[name]) for name, role in roles.items()}
        starts = [np.asarray(read[name]) for name, role in roles.items() if role == "episode_start"]
        if any(values is None for values in read.values()) or any(_look_like_places(each, num) for each in starts):
            return None
        lengths.append(num)
        kept.append((place, read))
        num_bytes += sum(arrays[name].dtype.itemsize * prod(arrays[name].shape) for name in roles)
        columns |= {name: None for name, role in roles.items() if role in SAYING}
        names = names or column_names(list(arrays), config.columns, source=source)
        if any(arrays[name].shape[0] > num for name, role in roles.items() if role == "observation"):
            names = {"next_observation": ("next_observation",), **names}  # which `align` makes of one observation more
    only_rewards = names.get("reward", ())  # where nothing else counts the rows
    rows = rows_of_parts(kept, config, source=source, are_apart=are_apart, only=columns or only_rewards)
    begins = np.cumsum([0, *lengths])[:-1] if len(parts) > 1 or are_apart else None
    return ScannedRows(rows, names, num_bytes / max(1, len(rows)), begins)


def _roles(arrays: Mapping[str, Any], config: DataConfig) -> dict[str, str]:
    """Our name for each array that has one."""
    names = column_names(list(arrays), config.columns, source="")
    return {column: ours for ours, columns in names.items() for column in columns}


def _num_rows(arrays: Mapping[str, Any], roles: Mapping[str, str]) -> int | None:
    """None: some array has not one entry for each row, nor one more for the observations after the last row."""
    rewards = next(arrays[name] for name, role in roles.items() if role == "reward")
    if not rewards.shape or (len(rewards.shape) > 1 and rewards.shape[1] > 1):
        return None
    num = rewards.shape[0]
    for name, role in roles.items():
        shape = arrays[name].shape
        allowed = (num, num + 1) if role == "observation" else (num,)
        if role != "episode_start" and (not shape or shape[0] not in allowed):
            return None
    return num


def _slice(arrays: Mapping[str, Any], roles: Mapping[str, str], begin: int, end: int, num: int) -> dict[str, ndarray]:
    result: dict[str, ndarray] = {}
    for name, role in roles.items():
        array = arrays[name]
        if role == "episode_start" and array.shape[:1] != (num,):
            result[name] = np.isin(np.arange(begin, end), np.asarray(array[()]).reshape(-1))
        else:
            result[name] = array[begin : end + (array.shape[0] == num + 1)]
    return result


def _look_like_places(values: ndarray, num: int) -> bool:
    """Whether starts are places but as many as rows, so that a slice of them could be taken for marks."""
    return values.shape[:1] == (num,) and are_places(values, num)


def _stand_in(array: Any) -> ndarray | None:
    """An array of this shape that takes no memory; None for what holds no numbers."""
    if array.dtype.kind not in "biuf":
        return None
    return np.broadcast_to(np.zeros((), np.float32 if array.dtype.kind == "b" else array.dtype), array.shape)


class ZippedArray:
    """A member of an NPZ file; rows of one that isn't compressed are read without those before them."""

    def __init__(self, stream: pa.NativeFile, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> None:
        self._stream, self._archive, self._info = stream, archive, info
        with archive.open(info) as member:
            version = np.lib.format.read_magic(member)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            self.shape, is_fortran, self.dtype = read(member)
            self._begin = member.tell()
        self.has_rows = len(self.shape) == 1 or (len(self.shape) > 1 and not is_fortran)

    def __getitem__(self, rows: Any) -> ndarray:
        begin, end, _ = (rows if isinstance(rows, slice) else slice(None)).indices(self.shape[0])
        size = self.dtype.itemsize * prod(self.shape[1:])
        skipped, wanted = self._begin + begin * size, max(0, end - begin) * size
        if self._info.compress_type == zipfile.ZIP_STORED:
            self._stream.seek(self._info.header_offset)
            lengths = LOCAL_HEADER.unpack(self._stream.read(LOCAL_HEADER.size))
            self._stream.seek(self._info.header_offset + LOCAL_HEADER.size + sum(lengths) + skipped)
            content = self._stream.read(wanted)
        else:
            with self._archive.open(self._info) as member:
                member.seek(skipped)
                content = member.read(wanted)
        return np.frombuffer(content, self.dtype).reshape(-1, *self.shape[1:])

    def check(self) -> None:
        """Raises:
        BadZipFile: its checksum says that it is damaged.
        """
        with self._archive.open(self._info) as member:
            while member.read(CHUNK_BYTES):
                pass


@contextmanager
def zipped_arrays(stream: pa.NativeFile) -> Generator[dict[str, ZippedArray]]:
    with zipfile.ZipFile(stream) as archive:  # type: ignore[arg-type]
        yield {
            info.filename.removesuffix(".npy"): ZippedArray(stream, archive, info)
            for info in archive.infolist()
            if info.filename.endswith(".npy")
        }

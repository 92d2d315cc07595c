"""The files of a dataset: which they are, in which format, and opening them with errors that name them."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Int
from numpy import ndarray
from pyarrow import fs

from dt_ray.config.schema import names_function
from dt_ray.data.filesystems import reach
from dt_ray.errors import DataError, StorageError

STORAGE_FAILURES = ("AWS Error", "google::cloud::Status")  # how pyarrow's OSErrors begin
EXTENSIONS = {  # in the order in which a folder's files are looked for
    "parquet": ("parquet",),
    "hdf5": ("hdf5", "h5"),
    "npz": ("npz",),
    "csv": ("csv", "tsv", "csv.gz", "tsv.gz"),
    "rllib-json": ("json", "jsonl"),
    "trajectories": ("pkl", "pickle"),
}
TABLES = ("parquet", "hdf5", "npz", "csv")  # of which a folder has one format, or the log would be read in part
PART_BYTES = 2**27  # of a file that one task reads, uncompressed
EXPANSION = 4  # times a file's size is the most that it takes in memory: small files need no look at their footer
MINARI = "minari:"  # before the id of a dataset that Minari keeps
FORMATS = ("minari", "lerobot", *EXTENSIONS)


@dataclass(frozen=True)
class Block:
    """A table in memory, or in an object store, which is read like a Parquet file."""

    schema: pa.Schema
    load: Callable[[], pa.Table]
    is_checked: bool = False  # its episodes were read before, and are taken as they are


@dataclass(frozen=True, kw_only=True)
class RowRange:
    """Consecutive rows of a large file, which are whole episodes, and what was found out about these.

    Where it isn't the last of its file, one row more is read: the first one of the next episode.
    """

    begin: int  # row
    episodes: Int[ndarray, "E"]  # their numbers among those of the file, where it is read whole
    lengths: Int[ndarray, "E"]
    ids: Int[ndarray, "E"]  # that no other episode of the dataset has
    logged_ids: Sequence[str]
    is_last: bool
    are_single: bool  # all episodes of the file are single steps
    doubt: str | None  # what looks wrong with the file
    parts: range | None = None  # of a container those that hold the rows, where it has several
    text: tuple[int, int, int] | None = None  # of a CSV file the bytes that hold the rows, and how many rows to skip
    schema: pa.Schema | None = None  # of a CSV file: the types that hold the values of all its rows

    @property
    def num_rows(self) -> int:
        """That are read."""
        return int(self.lengths.sum()) + (not self.is_last)


@dataclass(frozen=True, kw_only=True)
class DatasetFile:
    """A file of a dataset, or a part of a large file; for Minari, whose library reads all files, the folder."""

    index: int
    source: int = 0  # number of its dataset, where several are mixed
    path: str  # on the filesystem of the dataset
    dataset: str
    format: str = "parquet"  # of `FORMATS`
    size: int = 0  # bytes
    stamp: tuple[int, int] | None = None  # size and time (ns) of the last change of the whole file; None: not known
    row_groups: tuple[int, ...] | None = None  # of a large Parquet file those that are read; None: all
    rows: RowRange | None = field(default=None, compare=False)  # of another large file those that are read; None: all
    is_numbered: bool = False  # its episode ids occur in other files too: the file's number is added to them
    block: Block | None = None  # the table that stands for the file

    @property
    def order(self) -> int:
        """A number by which the files of a dataset, and the ranges of a file, are in the order of their rows."""
        return (self.index << 40) + (0 if self.rows is None else self.rows.begin)

    @property
    def is_large(self) -> bool:
        """Whether it may take more than `PART_BYTES` in memory."""
        return self.size > PART_BYTES / EXPANSION

    @property
    def filesystem(self) -> fs.FileSystem:
        return resolve(self.dataset)[0]

    @property
    def partitions(self) -> dict[str, str]:
        """Columns out of the names of the folders that it lies in, as `episode=3/` has one."""
        root = resolve(self.dataset)[1].rstrip("/")
        folders = self.path.removeprefix(root).split("/")[:-1]
        return {unquote(name): unquote(value) for name, _, value in (each.partition("=") for each in folders) if value}

    @contextmanager
    def open(self) -> Generator[pa.NativeFile]:
        """The file's bytes.

        Raises:
            DataError: the file is damaged, or of another format.
            StorageError: the storage doesn't answer.
        """
        try:
            with self.filesystem.open_input_file(self.path) as stream:
                yield stream
        except (pa.ArrowException, OSError) as error:
            if any(sign in str(error) for sign in STORAGE_FAILURES):  # which says nothing of the file
                raise StorageError(f"can't read {self.path}: {error}") from None
            name = {"parquet": "Parquet", "hdf5": "HDF5", "csv": "CSV"}.get(self.format, self.format)
            raise DataError(f"{self.path} is not a readable {name} file: {str(error).splitlines()[0]}") from None


def absolute(path: str) -> str:
    """The absolute path, or the URI; `minari:ID` becomes the folder in which Minari keeps that dataset.

    `module:function` stays as it is.
    """
    if names_function(path):
        return path
    if path.startswith(MINARI):
        path = os.path.join(os.environ.get("MINARI_DATASETS_PATH", "~/.minari/datasets"), path.removeprefix(MINARI))
    return path.rstrip("/") if "://" in path else os.path.abspath(os.path.expanduser(path))


def resolve(path: str) -> tuple[fs.FileSystem, str]:
    """The filesystem of a path or URI, and the absolute path on it."""
    return reach(absolute(path))


def _how_to_get(path: str) -> str:
    kept = f"{absolute(MINARI)}/"
    if (place := absolute(path)).startswith(kept):
        return f"`minari download {place.removeprefix(kept)}` puts it there (pip install 'dt-ray[formats]')"
    return f"make one with `python -m dt_ray.data collect --out {path}`"


def find_files(path: str, format: str | None = None) -> list[DatasetFile]:
    """The files of a dataset, sorted by path, which is the order of their rows; the format is found where not given.

    Raises:
        DataError: nothing there, or nothing in a format that is known.
        StorageError: the storage doesn't answer.
    """
    if names_function(path):
        raise DataError(f"{path} makes a Ray Dataset, and there is no file to read: what trains on it needs Ray")
    if format is not None and format not in FORMATS:
        raise DataError(f"data.format: one of {', '.join(FORMATS)}, got {format!r}")
    filesystem, root = resolve(path)
    try:
        info = filesystem.get_file_info(root)
        if info.type == fs.FileType.NotFound:
            raise DataError(f"no dataset at {path}; {_how_to_get(path)}")
        if info.type == fs.FileType.File:
            found, format = [root], format or _format_of(root) or "parquet"
            entries = [info]
        else:
            entries = [e for e in filesystem.get_file_info(fs.FileSelector(root, recursive=True)) if e.is_file]
            names = sorted(entry.path.removeprefix(f"{root}/") for entry in entries)
            format = format or _format_of_folder(names, path)
            found = [f"{root}/{name}".rstrip("/") for name in _names_of(format, names)]
    except OSError as error:
        raise StorageError(f"can't read {path}: {error}") from None
    if not format or not found:
        raise DataError(
            f"no *.parquet file in {path}, nor another log that is known: data.format is one of {', '.join(FORMATS)}"
        )
    stamps = {entry.path: _stamp_of([entry]) for entry in entries}
    whole = _stamp_of(entries)  # of a Minari dataset, whose one file is its folder
    files = [
        DatasetFile(
            index=0, path=file, dataset=path, format=format, size=size, stamp=None if time is None else (size, time)
        )
        for file in found
        for size, time in (stamps.get(file, whole),)
    ]
    return [replace(part, index=i) for i, part in enumerate(chain.from_iterable(map(_parts_of, files)))]


def _stamp_of(entries: Sequence[fs.FileInfo]) -> tuple[int, int | None]:
    """The size of some files together, and when the last one changed; None where the filesystem doesn't say."""
    times = [entry.mtime_ns for entry in entries]
    return sum(entry.size for entry in entries), None if None in times else max(times, default=None)


def join_parts(files: Sequence[DatasetFile]) -> list[DatasetFile]:
    """The same files, large ones in one part again."""
    whole: dict[tuple[int, str], DatasetFile] = {}
    for file in files:
        before = whole.get((file.source, file.path))
        size = file.size + (0 if before is None else before.size)
        whole[file.source, file.path] = replace(file, size=size, row_groups=None)
    return list(whole.values())


def _parts_of(file: DatasetFile) -> Iterator[DatasetFile]:
    """Parts of a Parquet file that take about `PART_BYTES` in memory, or one row group; other files are read whole."""
    if not file.is_large or file.format not in ("parquet", "lerobot"):
        yield file
        return
    try:
        with file.open() as stream:
            metadata = pq.read_metadata(stream)
    except DataError:  # reported when the file is read
        yield file
        return
    groups: list[int] = []
    size = 0
    for index in range(metadata.num_row_groups):
        groups.append(index)
        size += metadata.row_group(index).total_byte_size
        if size >= PART_BYTES or index == metadata.num_row_groups - 1:
            yield replace(file, row_groups=tuple(groups), size=size)
            groups, size = [], 0


def _format_of_folder(names: Sequence[str], path: str) -> str | None:
    """The format of a folder's files. JSON files and pickles beside tables are not its data; other files never are.

    Raises:
        DataError: there are tables of several formats.
    """
    if "meta/info.json" in names:
        return "lerobot"
    if "data/main_data.hdf5" in names or "data/metadata.json" in names:
        return "minari"
    counts = {format: len(_names_of(format, names)) for format in EXTENSIONS}
    found = [format for format, count in counts.items() if count]
    tables = [format for format in found if format in TABLES]
    if len(tables) > 1:
        listed = ", ".join(f"{counts[format]} of {format}" for format in tables)
        raise DataError(
            f"{path} has files of several formats, {listed}; move away what is not the log, or say which of them is: "
            f"data.format={max(tables, key=counts.__getitem__)} (--format)"
        )
    return found[0] if found else None


def _names_of(format: str | None, names: Sequence[str]) -> list[str]:
    if format == "minari":
        return [""]  # the folder: its own library reads it
    if format == "lerobot":
        return [name for name in names if name.startswith("data/") and name.endswith(".parquet")]
    return [name for name in names if format and _format_of(name) == format]


def _format_of(name: str) -> str | None:
    name = name.lower()
    return next(
        (format for format, extensions in EXTENSIONS.items() if any(name.endswith(f".{each}") for each in extensions)),
        None,
    )

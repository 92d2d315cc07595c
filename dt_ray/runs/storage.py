"""Files of a run on a local disk or in any other filesystem of pyarrow; a file is written completely or not at all."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from pyarrow import fs

from dt_ray.data.filesystems import reach
from dt_ray.errors import StorageError


class Stamp(NamedTuple):
    """Size and time of a file, which change when it is written again."""

    size: int
    written_ns: int


@dataclass(frozen=True)
class Folder:
    """A folder by its absolute path or URI; on a local disk every write is atomic and synced."""

    uri: str

    @classmethod
    def at(cls, path: str | Path) -> Folder:
        """The folder at a path, relative to the current working directory, or at a URI."""
        text = str(path)
        return cls(text.rstrip("/") if "://" in text else str(Path(text).expanduser().absolute()))

    @property
    def name(self) -> str:
        return PurePosixPath(self.uri).name

    @property
    def parent(self) -> Folder:
        return Folder(self.uri.rpartition("/")[0])

    @property
    def is_local(self) -> bool:
        return "://" not in self.uri

    def __truediv__(self, part: str) -> Folder:
        return Folder(f"{self.uri}/{part}")

    def __str__(self) -> str:
        return self.uri

    def kind(self) -> fs.FileType:
        with self._named_errors("reach"):
            filesystem, path = reach(self.uri)
            return filesystem.get_file_info(path).type

    def exists(self) -> bool:
        return self.kind() != fs.FileType.NotFound

    def names(self) -> list[str]:
        """What lies in the folder, sorted; nothing where there is no folder."""
        with self._named_errors("read"):
            filesystem, path = reach(self.uri)
            infos = filesystem.get_file_info(fs.FileSelector(path, allow_not_found=True))
        return sorted(info.base_name for info in infos)

    def stamps(self, *, recursive: bool = False) -> dict[str, Stamp]:
        """The files in the folder, or also below it, by their paths from there; one request, and nothing is read."""
        with self._named_errors("read"):
            filesystem, path = reach(self.uri)
            infos = filesystem.get_file_info(fs.FileSelector(path, allow_not_found=True, recursive=recursive))
        begin = len(path.rstrip("/")) + 1
        files = sorted((info for info in infos if info.type == fs.FileType.File), key=lambda info: info.path)
        return {info.path[begin:]: Stamp(info.size, info.mtime_ns) for info in files}

    def read_bytes(self) -> bytes:
        """The file's content.

        Raises:
            FileNotFoundError: there is none.
            StorageError: there may be one, but it can't be read.
        """
        with self._named_errors("read"):
            filesystem, path = reach(self.uri)
            with filesystem.open_input_stream(path) as stream:
                return stream.read()

    def read_text(self) -> str:
        return self.read_bytes().decode()

    def read_from(self, offset: int) -> bytes:
        """The file's content behind its first `offset` bytes; nothing where it is not longer.

        Raises:
            FileNotFoundError: there is none.
            StorageError: there may be one, but it can't be read.
        """
        with self._named_errors("read"):
            filesystem, path = reach(self.uri)
            with filesystem.open_input_file(path) as file:
                if (size := file.size()) <= offset:
                    return b""
                return file.read_at(size - offset, offset)

    def write_bytes(self, content: bytes) -> None:
        """Writes a file at once, under another name first on a disk; an object store shows whole ones only.

        Raises:
            StorageError: the disk is full, or can't be written or reached.
        """
        with self._named_errors("write"):
            if self.is_local:
                _replace_file(Path(self.uri), content)
                return
            filesystem, path = reach(self.uri)
            with filesystem.open_output_stream(path) as stream:
                stream.write(content)

    def write_text(self, text: str) -> None:
        self.write_bytes(text.encode())

    def append_text(self, text: str) -> None:
        """Appends to a file; object stores can't."""
        assert self.is_local, self
        with self._named_errors("write"), open(self.uri, "a") as stream:
            stream.write(text)

    def delete(self) -> None:
        """Deletes the file, or the folder with all that is in it, if it is there."""
        if (kind := self.kind()) != fs.FileType.NotFound:
            with self._named_errors("delete"):
                filesystem, path = reach(self.uri)
                (filesystem.delete_file if kind == fs.FileType.File else filesystem.delete_dir)(path)

    def rename(self, target: Folder) -> None:
        with self._named_errors("rename"):
            filesystem, path = reach(self.uri)
            filesystem.move(path, reach(target.uri)[1])

    @contextmanager
    def _named_errors(self, verb: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise
        except OSError as error:
            raise StorageError(f"can't {verb} {self}: {error}") from None


def _replace_file(target: Path, content: bytes) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        with temporary.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)

"""Files of a run on a local disk or anything else that pyarrow's filesystems reach: whole, or not there."""

from __future__ import annotations

import os
import uuid
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import pyarrow as pa
from pyarrow import fs

from dt_ray.errors import RunError


@dataclass(frozen=True)
class Folder:
    """A folder by its absolute path or URI; on a local disk every write is atomic and synced."""

    uri: str

    @classmethod
    def at(cls, path: str | Path) -> Folder:
        """The folder meant by a path, relative ones from the working directory of now, or a URI."""
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

    def _reach(self) -> tuple[fs.FileSystem, str]:
        if self.is_local:
            return fs.LocalFileSystem(), self.uri
        try:
            return fs.FileSystem.from_uri(self.uri)
        except (pa.ArrowException, OSError) as error:
            raise RunError(f"can't reach {self.uri}: {error}") from None

    def kind(self) -> fs.FileType:
        filesystem, path = self._reach()
        return filesystem.get_file_info(path).type

    def exists(self) -> bool:
        return self.kind() != fs.FileType.NotFound

    def names(self) -> list[str]:
        """What lies in the folder, sorted; nothing where there is no folder."""
        filesystem, path = self._reach()
        return sorted(info.base_name for info in filesystem.get_file_info(fs.FileSelector(path, allow_not_found=True)))

    def read_bytes(self) -> bytes:
        filesystem, path = self._reach()
        with filesystem.open_input_stream(path) as stream:
            return stream.read()

    def read_text(self) -> str:
        return self.read_bytes().decode()

    def write_bytes(self, content: bytes) -> None:
        """Writes a file at once: under another name first, where there are renames.

        Raises:
            RunError: the disk is full, or can't be written or reached.
        """
        filesystem, path = self._reach()
        try:
            if self.is_local:
                _replace_file(Path(path), content)
            else:
                with filesystem.open_output_stream(path) as stream:
                    stream.write(content)
        except OSError as error:
            raise RunError(f"can't write {self}: {error}") from None

    def write_text(self, text: str) -> None:
        self.write_bytes(text.encode())

    def append_line(self, line: str) -> None:
        """Appends to a file; object stores can't, there it is written anew."""
        if not self.is_local:
            self.write_text((self.read_text() if self.exists() else "") + line + "\n")
            return
        try:
            with open(self.uri, "a") as stream:
                stream.write(line + "\n")
        except OSError as error:
            raise RunError(f"can't write {self}: {error}") from None

    def delete(self) -> None:
        """Deletes the folder with all that is in it, if it is there."""
        filesystem, path = self._reach()
        if self.exists():
            filesystem.delete_dir(path)

    def rename(self, target: Folder) -> None:
        filesystem, path = self._reach()
        filesystem.move(path, target._reach()[1])


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

"""`metrics.jsonl`: a line for each logged step, written by rank 0 and read while it grows."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any

from dt_ray.runs.storage import Folder
from dt_ray.runs.writing import to_json

REWRITE_EVERY_S = 10.0  # of a file in an object store


class MetricsLog:
    """Writes the file. A resumed run first removes the lines of steps that it makes again: no step is there twice."""

    def __init__(self, file: Folder, *, resumed_at: int) -> None:
        self.file = file
        self._text = "".join(to_json(line) for line in read_metrics(file) if line["step"] <= resumed_at)
        file.write_text(self._text)
        self._written_at, self._is_written = time.monotonic(), True

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Appends a line; in an object store, which can't append, the whole file is written every few seconds."""
        line = to_json({"step": step, **values})
        if self.file.is_local:
            self.file.append_text(line)
            return
        self._text, self._is_written = self._text + line, False
        if time.monotonic() - self._written_at > REWRITE_EVERY_S:
            self.flush()

    def flush(self) -> None:
        """Returns when all lines are in the file."""
        if not self._is_written:
            self.file.write_text(self._text)
            self._written_at, self._is_written = time.monotonic(), True


class MetricsTail:
    """Reads the lines that are new since the last look, wherever the file is written."""

    def __init__(self, file: Folder) -> None:
        self.file = file
        self._read, self._last = 0, b""  # bytes of whole lines, and the last of these lines

    def new_lines(self) -> list[dict[str, Any]]:
        """The whole lines since the last call; all of them where a run was resumed or replaced meanwhile.

        A line that a crash cut short is left out.
        """
        begin = self._read - len(self._last)
        try:
            content = self.file.read_from(begin)
        except FileNotFoundError:
            content = b""
        if not content.startswith(self._last) or (begin and not content):  # another file than before
            self._read, self._last = 0, b""
            return self.new_lines() if begin or content else []
        whole = content[: content.rfind(b"\n") + 1]
        lines = whole[len(self._last) :].splitlines(keepends=True)
        if lines:
            self._read, self._last = begin + len(whole), lines[-1]
        return [values for line in lines if (values := _parsed(line)) is not None]


def read_metrics(file: Folder) -> list[dict[str, Any]]:
    """All lines of the file but for one that a crash cut short; none where there is no file."""
    return MetricsTail(file).new_lines()


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        return json.loads(line)
    except ValueError:
        return None

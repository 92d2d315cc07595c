"""JSON text, and a thread that writes a run's files while the training goes on."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any


def to_json(values: Mapping[str, Any], *, indent: int | None = None) -> str:
    """JSON text with a line's end; numbers that are not finite, which JSON does not have, become null."""
    return json.dumps(_finite(values), indent=indent, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class BackgroundWriter:
    """A thread that does writes one after the other, in the order in which they were submitted.

    After a failed write nothing more is written, since later files may refer to it.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="writer")
        self._newest: Future[None] | None = None
        self._failure: BaseException | None = None

    def submit(self, write: Callable[[], object]) -> Future[None]:
        """Begins a write; the future is done when it is.

        Raises:
            StorageError: an earlier one failed.
        """
        self.check()
        self._newest = self._thread.submit(self._run, write)
        return self._newest

    def wait(self) -> None:
        """Returns when all is written.

        Raises:
            StorageError: something could not be.
        """
        if self._newest is not None:
            self._newest.result()
        self.check()

    def check(self) -> None:
        """Raises:
        StorageError: something could not be written.
        """
        if self._failure is not None:
            raise self._failure

    def close(self) -> None:
        """Writes what was given and ends the thread."""
        self._thread.shutdown()

    def _run(self, write: Callable[[], object]) -> None:
        if self._failure is None:
            try:
                write()
            except BaseException as error:
                self._failure = error

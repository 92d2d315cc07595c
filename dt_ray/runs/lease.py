"""Ensures that one process at a time writes a run: it keeps a lease file in the run's folder up to date."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from dt_ray.errors import RunError, StorageError
from dt_ray.runs.storage import Folder

log = logging.getLogger("dt_ray")

FILE = "lease.json"
REFRESH_S = 10.0
STALE_S = 60.0  # a holder on another machine that has not refreshed for so long is taken for dead
HELD: set[str] = set()  # the leases that this process holds
SETTLE_S = 1.0  # between writing to an object store, which has no locks, and reading who wrote last


@dataclass(frozen=True, kw_only=True)
class Holder:
    """The process that writes a run, and the time of its last refresh (seconds since 1970)."""

    lease: str
    host: str
    pid: int
    started: str  # the start of the process in its system's count: process ids are reused
    refreshed: float

    def is_alive(self, now: float) -> bool:
        """Whether the holder still writes: by its process if that is on this machine, else by its last refresh."""
        if self.host == this_host():
            if self.pid == os.getpid():
                return self.lease in HELD
            return is_running(self.pid, started=self.started)
        return now - self.refreshed < STALE_S


class Lease:
    """The right to write into a folder; held from `acquire` to `close`."""

    def __init__(self, folder: Folder, *, clock: Callable[[], float] = time.time) -> None:
        self.folder, self.file, self.clock = folder, folder / FILE, clock
        self.name = uuid.uuid4().hex
        self._closed: threading.Event | None = None

    def check_free(self) -> None:
        """Raises:
        RunError: another process writes there.
        """
        holder = self._read()
        if holder is not None and holder.lease != self.name and holder.is_alive(self.clock()):
            seen = f"last seen {max(0, self.clock() - holder.refreshed):.0f} s ago"
            raise RunError(
                f"{self.folder} is being written by process {holder.pid} on {holder.host.partition(' ')[0]} ({seen}); "
                f"wait for its end, or stop it. A process that is gone from another machine is waited for "
                f"{STALE_S:.0f} s after it was last seen"
            )

    def acquire(self) -> None:
        """Takes the lease and keeps it fresh, in the place of a holder that is gone.

        Raises:
            RunError: another process has it.
        """
        with _locked(self.folder):
            self.check_free()
            HELD.add(self.name)
            self._write()
        if not self.folder.is_local:
            time.sleep(SETTLE_S)
            self.check_free()
        self._closed = threading.Event()
        threading.Thread(target=self._refresh, args=(self._closed,), daemon=True, name="lease").start()

    def close(self) -> None:
        """Gives the lease back, if it was taken."""
        HELD.discard(self.name)
        if self._closed is None:
            return
        self._closed.set()
        self._closed = None
        with contextlib.suppress(OSError, RunError), _locked(self.folder):
            if (holder := self._read()) is not None and holder.lease == self.name:
                self.file.delete()
        if self.folder.is_local:
            with contextlib.suppress(OSError):  # there is something in it
                Path(self.folder.uri).rmdir()

    def _refresh(self, closed: threading.Event) -> None:
        while not closed.wait(REFRESH_S):
            with contextlib.suppress(Exception):  # the run itself reports a storage that fails
                with _locked(self.folder):
                    holder = self._read()
                    if holder is not None and holder.lease == self.name and not closed.is_set():
                        self._write()
                if holder is not None and holder.lease != self.name:
                    log.warning("process %d on %s has taken over %s", holder.pid, holder.host, self.folder)
                    return

    def _read(self) -> Holder | None:
        if self.file.is_local and not Path(self.file.uri).exists():
            return None
        try:
            return TypeAdapter(Holder).validate_json(self.file.read_bytes())
        except (FileNotFoundError, ValidationError):
            return None

    def _write(self) -> None:
        holder = Holder(
            lease=self.name,
            host=this_host(),
            pid=os.getpid(),
            started=process_start(os.getpid()) or "",
            refreshed=self.clock(),
        )
        self.file.write_text(json.dumps(asdict(holder)) + "\n")


@contextlib.contextmanager
def _locked(folder: Folder) -> Iterator[None]:
    """Locks the folder, so that no other process of this machine reads or writes the lease meanwhile."""
    if not folder.is_local:
        yield
        return
    try:
        import fcntl
    except ImportError:
        yield
        return
    try:
        Path(folder.uri).mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder.uri, os.O_RDONLY)
    except OSError as error:
        raise StorageError(f"can't write {folder}: {error}") from None
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def this_host() -> str:
    """The name of this machine and its process namespace: containers with the same name differ in it."""
    namespace = ""
    with contextlib.suppress(OSError):
        namespace = os.readlink("/proc/self/ns/pid")
    boot = Path("/proc/sys/kernel/random/boot_id")
    return " ".join([platform.node(), namespace, boot.read_text().strip() if boot.exists() else ""]).strip()


def is_running(pid: int, *, started: str) -> bool:
    """Whether the process that started then still runs; a zombie counts as ended."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    now = process_start(pid)
    return now is None or not started or now == started


def process_start(pid: int) -> str | None:
    """When a process began, in its system's own count; "dead" for a zombie, None where that is not known."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return "dead" if fields[0] in "ZX" else fields[19]


def check_new(folder: Folder) -> None:
    """Raises:
    RunError: something but a lease is there.
    """
    if folder.exists() and folder.names() != [FILE]:
        raise RunError(
            f"{folder} exists already; choose another name=…, resume it with --resume {folder}, "
            f"or replace it with --overwrite"
        )


def clear(folder: Folder, *, kind: str, known_by: str) -> None:
    """Empties the folder of a run or sweep, its `kind`, except for the lease, which the caller holds.

    Raises:
        RunError: what is there is none: it has no file `known_by`.
    """
    if not folder.exists():
        return
    if not (folder / known_by).exists() and folder.names() != [FILE]:
        raise RunError(f"{folder} exists and is no {kind}; --overwrite replaces {kind}s only")
    for name in folder.names():
        if name != FILE:
            (folder / name).delete()

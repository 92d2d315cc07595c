"""The processes that this test run started, whoever else uses the machine."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

MARK = "DT_RAY_TEST_RUN"  # in the environment of everything that a test run starts
WAIT_S = 600.0  # far beyond what anything takes: a test ends there that would wait for ever


def mark_processes() -> None:
    """From now on everything that this process starts can be found by `processes_of`."""
    os.environ[MARK] = f"{os.getpid()}"


def processes_of(name: str, *, mark: str | None = None) -> set[int]:
    """The processes of this test run, or with this variable in their environment, whose command line holds a name."""
    mark = mark or f"{MARK}={os.environ[MARK]}"
    found = set()
    for place in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended, or is somebody else's
            is_ours = mark.encode() in (place / "environ").read_bytes().split(b"\0")
            if is_ours and name.encode() in (place / "cmdline").read_bytes():
                found.add(int(place.name))
    return found - {os.getpid()}


def kill(name: str, *, mark: str | None = None) -> set[int]:
    """Kills the processes of `processes_of`, of which there is at least one."""
    found = processes_of(name, mark=mark)
    assert found, f"no process {name}"
    for pid in found:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return found


def wait_until(holds: Callable[[], object], *, what: str | Callable[[], str] = "") -> None:
    """Returns when a condition holds."""
    deadline = time.monotonic() + WAIT_S
    while not holds():
        assert time.monotonic() < deadline, what() if callable(what) else what
        time.sleep(0.1)


def wait_for_nodes(python: Callable[..., subprocess.CompletedProcess[str]], num_nodes: int) -> None:
    """Returns when a Ray cluster has so many nodes; `python` runs Python where the cluster is the one to join."""
    look = f"""
import ray, time
ray.init(log_to_driver=False)
deadline = time.monotonic() + {WAIT_S}
while (num := sum(node["Alive"] for node in ray.nodes())) != {num_nodes}:
    assert time.monotonic() < deadline, num
    time.sleep(0.3)
print("there")
"""
    wait_until(lambda: "there" in python("-c", look).stdout, what=f"there are not {num_nodes} nodes")

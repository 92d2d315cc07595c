"""Ctrl-C and SIGTERM while training: the first asks for an end at the next update, the second ends at once."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

log = logging.getLogger("dt_ray")


class Terminated(KeyboardInterrupt):
    """Raised for SIGTERM, as `KeyboardInterrupt` is for Ctrl-C."""


class StoppedEarlyError(Exception):
    """The work was asked to stop and ended without a result."""


# Ray raises KeyboardInterrupt for any exception of a signal handler within its calls.
sigterm_received = threading.Event()
EXCEPTIONS = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: Terminated}


def raise_on_sigterm() -> None:
    """From now on SIGTERM raises `Terminated`, as Ctrl-C raises `KeyboardInterrupt`."""

    def handle(number: int, frame: FrameType | None) -> None:
        sigterm_received.set()
        raise Terminated

    signal.signal(signal.SIGTERM, handle)


@contextmanager
def stops_asked_of(ask: Callable[[], object]) -> Iterator[None]:
    """Calls `ask` at the first signal; raises its exception when the block has ended, or at the second signal.

    A block that is asked to stop may end with `StoppedEarlyError`; any other error of it is raised as it is.
    Signals reach the main thread only: in another one the block runs as it is.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if len(received) > 1:
            raise EXCEPTIONS[signal.Signals(number)]
        log.warning("stopping after the next checkpoint; a second signal stops at once")
        ask()

    before = {number: signal.signal(number, handle) for number in EXCEPTIONS}
    try:
        yield
    except StoppedEarlyError:
        if not received:
            raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if received:
        raise EXCEPTIONS[signal.Signals(received[0])]

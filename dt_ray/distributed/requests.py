"""Requests to an autoscaler while a run waits for nodes, until its workers are placed.

Ray's autoscaler has one request at a time: each replaces the one before. So requests go through the actor that Ray
Train and Ray Data use: it adds up all requests and drops those of processes that have ended.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import ray
import ray.exceptions

RENEW_EVERY_S = 10.0
EXPIRE_AFTER_S = 60.0  # of a driver that was killed
ANSWERS_WITHIN_S = 10.0


class NodeRequest:
    """A request for nodes, renewed until it is released or handed over."""

    def __init__(self, bundles: Sequence[dict[str, float]]) -> None:
        self.name, self.bundles = f"dt_ray-{uuid.uuid4().hex}", list(bundles)
        self._ended = threading.Event()
        self._send(self.name)
        threading.Thread(target=self._renew, daemon=True, name="node request").start()

    def hand_over(self, name: str) -> None:
        """Continues the request under another name, whose owner renews it from now on."""
        self._ended.set()
        self._send(name)
        cancel_request(self.name)
        self.name = name

    def release(self) -> None:
        self._ended.set()
        cancel_request(self.name)

    def _renew(self) -> None:
        while not self._ended.wait(RENEW_EVERY_S):
            self._send(self.name)

    def _send(self, name: str) -> None:
        from ray.data._internal.cluster_autoscaler.base_autoscaling_coordinator import ResourceRequestPriority

        # Ray Data, which runs meanwhile, comes first.
        with suppress(ray.exceptions.RayError):
            call = _coordinator().request_resources.remote(
                requester_id=name,
                resources=self.bundles,
                expire_after_s=EXPIRE_AFTER_S,
                priority=ResourceRequestPriority.LOW,
            )
            ray.get(call, timeout=ANSWERS_WITHIN_S)


def _coordinator() -> Any:
    # Imported here, like the priority: workers and evaluation actors, which ask for no nodes, start without Ray Data.
    from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (
        get_or_create_autoscaling_coordinator,
    )

    return get_or_create_autoscaling_coordinator()


def cancel_request(name: str) -> None:
    """Cancels the request of this name, without waiting."""
    with suppress(ray.exceptions.RayError):
        _coordinator().cancel_request.remote(requester_id=name)


_held: list[NodeRequest] = []


def hold_request(bundles: Sequence[dict[str, float]]) -> None:
    """Asks for nodes until `hand_over_requests` or `release_requests`, which a connection's end calls."""
    _held.append(NodeRequest(bundles))


def hand_over_requests(name: str) -> None:
    """Hands the requests over to the controller that places the workers, which uses this name."""
    for request in _held:
        request.hand_over(name)
    _held.clear()


def release_requests() -> None:
    """Cancels all requests of this process."""
    while _held:
        _held.pop().release()

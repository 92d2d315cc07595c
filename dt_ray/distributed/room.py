"""Waits for room for a run on a cluster that others use too, for a limited time and with warnings."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from dt_ray.distributed.requests import hold_request
from dt_ray.distributed.resources import Node
from dt_ray.distributed.usage import cluster_nodes, describe_free, free_nodes
from dt_ray.errors import ResourceError

log = logging.getLogger("dt_ray")
T = TypeVar("T")

LOOK_EVERY_S = 1.0
SETTLES_WITHIN_S = 5.0  # a run that has just ended may hold its CPUs for so long
SAYS_EVERY_S = 60.0


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Access to the cluster and the clock, which tests replace."""

    total: Callable[[], Sequence[Node]] = cluster_nodes
    free: Callable[[], Sequence[Node]] = free_nodes
    describe: Callable[[], str] = describe_free
    request: Callable[[Sequence[dict[str, float]]], None] = hold_request
    now: Callable[[], float] = time.monotonic
    sleep: Callable[[float], Any] = time.sleep


@dataclass(frozen=True, kw_only=True)
class Room(Generic[T]):
    """A plan that there is room for, and a note if others leave less room than the whole cluster."""

    plan: T
    note: str | None = None


def wait_for_room(
    plan: Callable[[Sequence[Node]], T],
    *,
    is_fair: Callable[[T, T], bool],
    cluster: Cluster,
    wait_s: float,
    bundles: Sequence[dict[str, float]],
) -> Room[T]:
    """The plan for the whole cluster if that is free, else the plan for what is free; waits up to `wait_s` seconds.

    Where the whole cluster is too small, an autoscaler is asked for `bundles` meanwhile. `is_fair(wanted, less)` says
    whether a run may begin with less than it would get of the whole cluster.

    Raises:
        ResourceError: the cluster is too small, or others use it for longer than that.
    """
    began, said = cluster.now(), -SAYS_EVERY_S
    requested = False
    while True:
        waited = cluster.now() - began
        shortage, wanted = None, None
        try:
            wanted = plan(cluster.total())
        except ResourceError as error:
            shortage = error
        if wanted is not None:
            found = _plan_by_free(plan, wanted, is_fair, cluster, settled=waited >= SETTLES_WITHIN_S)
            if found is not None:
                return found
            shortage = ResourceError(f"no room for the run now: {cluster.describe()}")
        elif waited == 0 and wait_s == 0 and shortage is not None:
            raise shortage
        assert shortage is not None
        if waited >= max(wait_s, SETTLES_WITHIN_S if wanted is not None else 0):
            advice = "" if wanted is None else "; wait for them with a larger scaling.wait_for_nodes_s (seconds)"
            raise ResourceError(f"{shortage}{advice}")
        if wanted is None and not requested:
            requested = True
            cluster.request(bundles)
        if wait_s and waited - said >= SAYS_EVERY_S and (wanted is None or waited >= SETTLES_WITHIN_S):
            said = waited
            log.warning("waiting up to %g s for %s: %s", wait_s, "nodes" if wanted is None else "room", shortage)
        cluster.sleep(LOOK_EVERY_S)


def _plan_by_free(
    plan: Callable[[Sequence[Node]], T], wanted: T, is_fair: Callable[[T, T], bool], cluster: Cluster, *, settled: bool
) -> Room[T] | None:
    try:
        found = plan(cluster.free())
    except ResourceError:
        return None
    if found == wanted:
        return Room(plan=wanted)
    if settled and is_fair(wanted, found):
        return Room(plan=found, note=f"planned by what is free: {cluster.describe()}")
    return None

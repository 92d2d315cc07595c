"""The use of the cluster: free resources of nodes, placement groups and jobs."""

from __future__ import annotations

import logging
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import ray
import ray._private.state
from ray import PlacementGroupID
from ray.core.generated import gcs_pb2
from ray.util.placement_group import PlacementGroup, remove_placement_group

from dt_ray.distributed.resources import ACCELERATOR, Node

log = logging.getLogger("dt_ray")

LOOK_EVERY_S = 10.0
SAYS_EVERY_S = 60.0
gcs: Any = gcs_pb2  # made from .proto files, which type checkers don't read
MAX_ENTRYPOINT = 160  # characters of a job's command


@dataclass(frozen=True, kw_only=True)
class Group:
    """A placement group."""

    name: str
    creator: str  # id of the actor that made it, which is all zeros or ones for a driver
    job: str
    resources: Mapping[str, float]
    is_waiting: bool


def find_groups(*, creator: str | None = None) -> list[Group]:
    """All placement groups, or those of one creator, which Ray's own table does not name."""
    groups = []
    for raw in _accessor().get_placement_group_table():
        data = gcs.PlacementGroupTableData.FromString(raw)
        if data.state == gcs.PlacementGroupTableData.REMOVED:
            continue
        resources: dict[str, float] = defaultdict(float)
        for bundle in data.bundles:
            for kind, amount in bundle.unit_resources.items():
                resources[kind] += amount
        group = Group(
            name=data.placement_group_id.hex(),
            creator=data.creator_actor_id.hex(),
            job=data.creator_job_id.hex(),
            resources=dict(resources),
            is_waiting=data.state != gcs.PlacementGroupTableData.CREATED,
        )
        if creator is None or group.creator == creator:
            groups.append(group)
    return groups


def remove_group(group: Group) -> None:
    remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(group.name))))


def cluster_nodes() -> list[Node]:
    """The nodes of the cluster that is joined."""
    return [_node(each["Resources"]) for each in ray.nodes() if each["Alive"]]


def free_nodes() -> list[Node]:
    """The same nodes with the resources that are free now."""
    free = ray._private.state.available_resources_per_node()
    return [_node(each["Resources"], free.get(each["NodeID"], {})) for each in ray.nodes() if each["Alive"]]


def _node(resources: Mapping[str, float], free: Mapping[str, float] | None = None) -> Node:
    kinds = (name.removeprefix(ACCELERATOR) for name in resources if name.startswith(ACCELERATOR))
    amounts = resources if free is None else free
    return Node(cpus=amounts.get("CPU", 0), gpus=amounts.get("GPU", 0), accelerators=frozenset(kinds))


def describe_free() -> str:
    """The free resources, and the jobs that use the others, in words."""
    total, free = cluster_nodes(), free_nodes()
    text = f"{_sum(free, 'cpus'):g} of {_sum(total, 'cpus'):g} CPUs are free"
    if gpus := _sum(total, "gpus"):
        text += f", {_sum(free, 'gpus'):g} of {gpus:g} GPUs"
    users = describe_users()
    return f"{text}; in use by {users}" if users else text


@contextmanager
def saying_when_full(what: str) -> Iterator[None]:
    """Logs a warning while tasks of the block wait for CPUs: it names the jobs that hold them."""
    ended = threading.Event()

    def look() -> None:
        said = -SAYS_EVERY_S
        while not ended.wait(LOOK_EVERY_S):
            with suppress(Exception):  # the connection may end at any moment
                held = sum(has.get("CPU", 0.0) for has in _held().values())
                now = time.monotonic()
                if held > _sum(cluster_nodes(), "cpus") - 1 and now - said >= SAYS_EVERY_S:
                    said = now
                    log.warning("waiting for a CPU for %s: %s", what, describe_free())

    threading.Thread(target=look, daemon=True, name="looks who has the CPUs").start()
    try:
        yield
    finally:
        ended.set()


def describe_users() -> str:
    """The jobs that hold CPUs or GPUs, with their commands and amounts, the largest first."""
    jobs = {job["JobID"]: job for job in ray._private.state.jobs()}
    users = sorted(_held().items(), key=lambda each: -sum(each[1].values()))
    return "; ".join(f"{_command(jobs.get(job, {}), job)} ({_amounts(has)})" for job, has in users if _amounts(has))


def _held() -> dict[str, dict[str, float]]:
    """CPUs and GPUs of placement groups and actors, by the jobs that they belong to."""
    held: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for group in find_groups():
        if not group.is_waiting:
            _add(held[group.job], group.resources)
    for raw in _accessor().get_actor_table(None, "ALIVE"):
        actor = gcs.ActorTableData.FromString(raw)
        if not actor.placement_group_id.strip(b"\xff"):  # those in a group are counted with it
            _add(held[actor.job_id.hex()], actor.required_resources)
    return held


def _accessor() -> Any:
    return ray._private.state.state._connect_and_get_accessor()


def _sum(nodes: list[Node], kind: str) -> float:
    return sum(getattr(node, kind) for node in nodes)


def _add(held: dict[str, float], resources: Mapping[str, float]) -> None:
    for kind in ("CPU", "GPU"):
        held[kind] += resources.get(kind, 0.0)


def _amounts(held: Mapping[str, float]) -> str:
    return ", ".join(f"{amount:g} {kind}{'s' * (amount != 1)}" for kind, amount in held.items() if amount > 1e-6)


def _command(job: Mapping[str, Any], name: str) -> str:
    command = " ".join(str(job.get("Entrypoint", "")).split())
    interpreter, _, arguments = command.partition(" ")
    command = f"{PurePath(interpreter).name} {arguments}".strip()
    short = command if len(command) <= MAX_ENTRYPOINT else command[:MAX_ENTRYPOINT] + "…"
    return f"job {name} on {job.get('DriverIPAddress', 'an unknown node')}" + (f": {short}" if short else "")

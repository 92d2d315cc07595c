"""Plans the CPUs of workers and actors, and compares them with the cluster before anything starts.

In Ray a task or an actor that asks for more than there is waits for ever, without a message.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from dt_ray.config.schema import RunConfig, ScalingConfig
from dt_ray.errors import ResourceError

MAX_AUTOMATIC_CPUS_PER_WORKER = 4  # a model of this size gains nothing from more threads
MAX_AUTOMATIC_ACTORS = 4
EPSILON = 1e-6
TRIAL_CPUS = 0.01  # of a trial's own process where it only waits for its workers: Ray Tune needs more than 0
ACCELERATOR = "accelerator_type:"  # what Ray's resource of a type of GPU begins with


@dataclass(frozen=True, kw_only=True)
class Node:
    """A machine of the cluster."""

    cpus: float
    gpus: float = 0.0
    accelerators: frozenset[str] = frozenset()  # as Ray names them: H100, L4


@dataclass(frozen=True, kw_only=True)
class ResourcePlan:
    """The resources of a run while it trains. Data tasks run before that, with one CPU each."""

    num_workers: int  # the smallest number, where `max_workers` is given
    max_workers: int | None = None  # of an elastic run
    cpus_per_worker: float
    use_gpu: bool
    num_actors: int  # 0: evaluations run in the training process
    cpus_per_actor: float = 1.0
    notes: tuple[str, ...] = ()


class TrialPlan(NamedTuple):
    """The resources of a sweep's trials."""

    cpus_per_worker: float
    num_concurrent: int


def describe_plan(plan: ResourcePlan, scaling: ScalingConfig, nodes: Sequence[Node]) -> dict[str, str]:
    """The resources that a run needs and those of the cluster, in words."""
    cpus, gpus = sum(node.cpus for node in nodes), sum(node.gpus for node in nodes)
    workers = f"{plan.num_workers}" if plan.max_workers is None else f"{plan.num_workers} to {plan.max_workers}"
    gpu = f" and a {scaling.accelerator_type or 'GPU'}" if plan.use_gpu else ""
    actors = (
        f"{plan.num_actors}, {plan.cpus_per_actor:g} CPU each" if plan.num_actors else "none: in the training process"
    )
    asked = plan.num_workers * plan.cpus_per_worker + plan.num_actors * plan.cpus_per_actor
    return {
        "training workers": f"{workers}, {plan.cpus_per_worker:g} CPU(s){gpu} each, {scaling.placement_strategy}",
        "evaluation actors": actors,
        "together": f"{asked:g} of {cpus:g} CPUs, {plan.num_workers * plan.use_gpu} of {gpus:g} GPUs",
        "nodes": ", ".join(f"{node.cpus:g} CPUs" + f" {node.gpus:g} GPUs" * (node.gpus > 0) for node in nodes),
        "data tasks": "before the training, one CPU each, as there is room",
        **({"note": "; ".join(plan.notes)} if plan.notes else {}),
    }


def describe_workers(plan: ResourcePlan) -> str:
    """The resources that the workers need, in words."""
    gpu = " and a GPU" if plan.use_gpu else ""
    return f"{plan.num_workers} worker(s) with {plan.cpus_per_worker:g} CPU(s){gpu} each"


def plan_resources(config: RunConfig, nodes: Sequence[Node]) -> ResourcePlan:
    """Fits workers and evaluation actors onto the nodes of a cluster.

    Raises:
        ResourceError: the workers alone need more than there is, all together or on one node.
    """
    scaling, wanted_actors = config.scaling, config.evaluation.num_actors
    num_workers, cpus = scaling.min_workers, sum(node.cpus for node in nodes)
    _check_gpus(scaling, nodes)
    actors = _automatic_actors(cpus) if wanted_actors is None else wanted_actors
    if config.env_id is None:
        actors = wanted_actors = 0
    notes = []
    if (most := config.evaluation.max_envs) < actors:
        notes += [f"{most} evaluation actor(s): evaluation.max_envs={most}"] * (wanted_actors is not None)
        actors = most
    cpus_per_worker = scaling.cpus_per_worker or _fair_share(scaling, nodes, reserved=actors)
    if _room(cpus_per_worker, scaling, nodes) < num_workers:
        total, there = num_workers * cpus_per_worker, ", ".join(f"{node.cpus:g}" for node in nodes)
        reason = f"there are {cpus:g}; lower one of them"
        if total <= cpus:
            reason = (
                f"don't fit, {scaling.placement_strategy}, on nodes of {there}; lower one of them, or place otherwise"
            )
        raise ResourceError(
            f"{num_workers} worker(s) with scaling.cpus_per_worker={cpus_per_worker:g} ask for {total:g} CPUs and "
            + reason
        )
    if scaling.cpus_per_worker is None and cpus_per_worker < 1:
        notes.append(f"{num_workers} workers share {cpus:g} CPUs: {cpus_per_worker:g} each")
    num_actors = min(_left_over(cpus_per_worker, scaling, nodes), actors)
    if num_actors == 0 and wanted_actors != 0:
        notes.append(
            f"{num_workers} worker(s) take {num_workers * cpus_per_worker:g} of {cpus:g} CPUs and leave none for "
            f"evaluation actors: evaluations run in the training process"
        )
    elif wanted_actors is not None and num_actors < actors:
        notes.append(
            f"{num_actors} evaluation actor(s) instead of {actors}: that is what the workers leave of {cpus:g} CPUs"
        )
    if scaling.is_elastic and not (config.checkpoint.every or config.evaluation.every):
        notes.append("checkpoint.every=0: should a node be lost, the workers that are left begin again at update 0")
    return ResourcePlan(
        num_workers=num_workers,
        max_workers=scaling.max_workers if scaling.is_elastic else None,
        # Ray Train sizes an elastic run by all CPUs that nobody reserved, those of actors too, and waits for them.
        cpus_per_actor=0.0 if scaling.is_elastic else 1.0,
        cpus_per_worker=cpus_per_worker,
        use_gpu=scaling.use_gpu,
        num_actors=num_actors,
        notes=tuple(notes),
    )


def plan_trials(scaling: ScalingConfig, nodes: Sequence[Node], *, wanted: int) -> TrialPlan:
    """Fits as many as there is room for of the trials `wanted` at a time onto the nodes of a cluster.

    A worker takes more than one CPU where as many trials still fit.

    Raises:
        ResourceError: not even one.
    """
    _check_gpus(scaling, nodes)
    shares = [float(cpus) for cpus in range(MAX_AUTOMATIC_CPUS_PER_WORKER, 0, -1)]
    if scaling.cpus_per_worker is not None:
        shares = [scaling.cpus_per_worker]
    most, cpus = max((_room_for_trials(share, scaling, nodes, wanted=wanted), share) for share in shares)
    if most == 0:
        workers, there = max(1, scaling.max_workers), ", ".join(f"{node.cpus:g}" for node in nodes)
        own = f" and {TRIAL_CPUS:g} of its own" if workers > 1 else ""
        raise ResourceError(
            f"a trial of {workers} worker(s) with {min(shares):g} CPU(s) each{own} does not fit on nodes of "
            f"{there} CPUs; lower scaling.num_workers or scaling.cpus_per_worker"
        )
    return TrialPlan(cpus, most)


def _room_for_trials(cpus_per_worker: float, scaling: ScalingConfig, nodes: Sequence[Node], *, wanted: int) -> int:
    workers = max(1, scaling.max_workers)
    for trials in range(wanted, 0, -1):
        # The process of a trial with several workers may be on any node.
        free = [replace(node, cpus=node.cpus - trials * TRIAL_CPUS * (workers > 1)) for node in nodes]
        places = _places(cpus_per_worker, scaling, free, most=trials)
        if scaling.placement_strategy == "STRICT_PACK":
            places = [room // workers * workers for room in places]
        if sum(places) >= trials * workers:
            return trials
    return 0


def worker_bundles(scaling: ScalingConfig) -> list[dict[str, float]]:
    """The resources of each worker, for an autoscaler."""
    return [worker_bundle(scaling, scaling.cpus_per_worker or 1.0)] * scaling.min_workers


def worker_bundle(scaling: ScalingConfig, cpus: float) -> dict[str, float]:
    """The resources of one worker."""
    bundle = {"CPU": cpus} | ({"GPU": 1.0} if scaling.use_gpu else {})
    if scaling.accelerator_type is not None:
        bundle[f"{ACCELERATOR}{scaling.accelerator_type}"] = 0.001
    return bundle


def _check_gpus(scaling: ScalingConfig, nodes: Sequence[Node]) -> None:
    if not scaling.use_gpu:
        return
    kind = scaling.accelerator_type
    gpus = sum(math.floor(node.gpus) for node in nodes if kind is None or kind in node.accelerators)
    if gpus < scaling.min_workers:
        name = "GPU" if kind is None else kind
        known = ", ".join(sorted({each for node in nodes for each in node.accelerators}))
        raise ResourceError(
            f"scaling.num_workers={scaling.min_workers} with scaling.use_gpu asks for {scaling.min_workers} {name}(s) "
            f"and there are {gpus:g}; lower scaling.num_workers or set scaling.use_gpu=false"
            + (f" (there are GPUs of type {known})" if kind and known else "")
        )


def _fair_share(scaling: ScalingConfig, nodes: Sequence[Node], *, reserved: int) -> float:
    """CPUs of a worker: several if that leaves room for the actors, else one, or a fraction if there are fewer."""
    num_workers = scaling.min_workers
    if scaling.is_elastic:
        return 1.0  # whatever the nodes that come and go have
    for cpus in range(MAX_AUTOMATIC_CPUS_PER_WORKER, 0, -1):
        fits = _room(cpus, scaling, nodes) >= num_workers
        if fits and (cpus == 1 or _left_over(cpus, scaling, nodes) >= reserved):
            return float(cpus)
    hundredths = math.floor(100 * sum(node.cpus for node in nodes) / num_workers)
    shares = (share / 100 for share in range(min(hundredths, 100), 0, -1))
    return next((share for share in shares if _room(share, scaling, nodes) >= num_workers), 1.0)


def _places(cpus_per_worker: float, scaling: ScalingConfig, nodes: Sequence[Node], *, most: int = 1) -> list[int]:
    """How many workers each node has room for; with STRICT_SPREAD at most `most`, one of each run."""
    places = []
    for node in nodes:
        room = math.floor(node.cpus / cpus_per_worker + EPSILON)
        if scaling.use_gpu:
            room = min(room, math.floor(node.gpus))
        if scaling.accelerator_type is not None and scaling.accelerator_type not in node.accelerators:
            room = 0
        places.append(min(room, most) if scaling.placement_strategy == "STRICT_SPREAD" else room)
    return places


def _room(cpus_per_worker: float, scaling: ScalingConfig, nodes: Sequence[Node]) -> int:
    places = _places(cpus_per_worker, scaling, nodes)
    return max(places, default=0) if scaling.placement_strategy == "STRICT_PACK" else sum(places)


def _left_over(cpus_per_worker: float, scaling: ScalingConfig, nodes: Sequence[Node]) -> int:
    """Whole CPUs that are free when the workers are placed."""
    waiting, free = scaling.min_workers, 0
    places = _places(cpus_per_worker, scaling, nodes)
    for room, node in sorted(zip(places, nodes, strict=True), key=lambda each: -each[0]):
        here = min(waiting, room)
        waiting -= here
        free += math.floor(node.cpus - here * cpus_per_worker + EPSILON)
    return free


def _automatic_actors(cpus: float) -> int:
    return min(MAX_AUTOMATIC_ACTORS, max(1, int(cpus) // 4))

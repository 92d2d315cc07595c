"""Who gets which CPUs: worked out and compared with what there is before anything starts.

Ray lets a task or an actor that asks for more than is free wait for ever, and says nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from dt_ray.config import RunConfig
from dt_ray.errors import ResourceError

MAX_AUTOMATIC_CPUS_PER_WORKER = 4  # a model of this size gains nothing from more threads
MAX_AUTOMATIC_ACTORS = 4


@dataclass(frozen=True, kw_only=True)
class ResourcePlan:
    """What a run takes while it trains. Data tasks come before that, one CPU each, and wait for each other."""

    num_workers: int  # at least, where `max_workers` is given
    max_workers: int | None = None  # of an elastic run
    cpus_per_worker: float
    use_gpu: bool
    num_actors: int  # 0: evaluations run in the training process
    cpus_per_actor: float = 1.0
    notes: tuple[str, ...] = ()


def describe_plan(plan: ResourcePlan, *, cpus: float, gpus: float) -> dict[str, str]:
    """What a run will ask for and what there is, in words."""
    workers = f"{plan.num_workers}" if plan.max_workers is None else f"{plan.num_workers} to {plan.max_workers}"
    gpu = " and a GPU" if plan.use_gpu else ""
    actors = (
        f"{plan.num_actors}, {plan.cpus_per_actor:g} CPU each" if plan.num_actors else "none: in the training process"
    )
    asked = plan.num_workers * plan.cpus_per_worker + plan.num_actors * plan.cpus_per_actor
    return {
        "training workers": f"{workers}, {plan.cpus_per_worker:g} CPU(s){gpu} each",
        "evaluation actors": actors,
        "together": f"{asked:g} of {cpus:g} CPUs, {plan.num_workers * plan.use_gpu} of {gpus:g} GPUs",
        "data tasks": "before the training, one CPU each, as there is room",
        **({"note": "; ".join(plan.notes)} if plan.notes else {}),
    }


def plan_resources(config: RunConfig, *, cpus: float, gpus: float) -> ResourcePlan:
    """Fits workers and evaluation actors into a cluster of so many CPUs and GPUs.

    Raises:
        ResourceError: the workers alone need more than there is.
    """
    scaling, wanted_actors = config.scaling, config.evaluation.num_actors
    num_workers = scaling.min_workers
    notes = []
    if scaling.use_gpu and gpus < num_workers:
        raise ResourceError(
            f"scaling.num_workers={num_workers} with scaling.use_gpu asks for {num_workers} GPU(s) and there are "
            f"{gpus:g}; lower scaling.num_workers or set scaling.use_gpu=false"
        )
    if scaling.cpus_per_worker is not None:
        cpus_per_worker = scaling.cpus_per_worker
        if (total := num_workers * cpus_per_worker) > cpus:
            raise ResourceError(
                f"{num_workers} worker(s) with scaling.cpus_per_worker={cpus_per_worker:g} ask for {total:g} CPUs and "
                f"there are {cpus:g}; lower one of them"
            )
    elif scaling.is_elastic:
        cpus_per_worker = 1.0  # whatever the nodes that come and go have
    elif num_workers > cpus:
        cpus_per_worker = math.floor(100 * cpus / num_workers) / 100
        notes.append(f"{num_workers} workers share {cpus:g} CPUs: {cpus_per_worker:g} each")
    else:
        reserved = _automatic_actors(cpus) if wanted_actors is None else wanted_actors
        fair = math.floor((cpus - reserved) / num_workers)
        cpus_per_worker = float(min(max(fair, 1), MAX_AUTOMATIC_CPUS_PER_WORKER))
    free = math.floor(cpus - num_workers * cpus_per_worker + 1e-6)
    num_actors = min(free, _automatic_actors(cpus) if wanted_actors is None else wanted_actors)
    if num_actors == 0 and wanted_actors != 0:
        notes.append(
            f"{num_workers} worker(s) take {num_workers * cpus_per_worker:g} of {cpus:g} CPUs and leave none for "
            f"evaluation actors: evaluations run in the training process"
        )
    elif wanted_actors is not None and num_actors < wanted_actors:
        notes.append(
            f"{num_actors} evaluation actor(s) instead of {wanted_actors}: "
            f"that is what the workers leave of {cpus:g} CPUs"
        )
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


def _automatic_actors(cpus: float) -> int:
    return min(MAX_AUTOMATIC_ACTORS, max(1, int(cpus) // 4))

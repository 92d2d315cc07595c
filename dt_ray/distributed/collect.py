"""Collecting episodes with Ray tasks, a few chunks at a time, written in order as they come."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import pyarrow as pa
import ray
from ray.exceptions import WorkerCrashedError

from dt_ray.distributed.cluster import user_errors
from dt_ray.distributed.usage import saying_when_full
from dt_ray.errors import EnvironmentCrashError
from dt_ray.play.collection import CollectionPlan, collect_chunk

MAX_RETRIES = 3  # of a chunk whose process is lost


def collect_on_ray(plan: CollectionPlan, *, num_workers: int | None = None) -> Iterator[pa.Table]:
    """The tables of all chunks, in order; only a few chunks are played at a time, so that memory stays bounded.

    Raises:
        EnvironmentCrashError: the environment ends each process that plays it.
    """
    task = ray.remote(num_cpus=1, max_retries=MAX_RETRIES)(_collect)
    num_parallel = min(num_workers or max(1, int(ray.cluster_resources().get("CPU", 1))), plan.max_envs)
    waiting, running = deque(plan.chunks()), deque()
    with user_errors(), saying_when_full("collecting"):
        while waiting or running:
            while waiting and len(running) < num_parallel:
                running.append((task.remote(plan, waiting[0], num_parallel), waiting.popleft()))
            call, episodes = running.popleft()
            try:
                table = ray.get(call)
            except WorkerCrashedError:
                raise EnvironmentCrashError(
                    f"{plan.env_id} ended {MAX_RETRIES + 1} processes one after the other that played it with seeds "
                    f"{plan.seed + episodes[0]} to {plan.seed + episodes[-1]}; collect with another seed, or fewer "
                    f"episodes at a time"
                ) from None
            yield table


def _collect(plan: CollectionPlan, episodes: range, num_processes: int) -> pa.Table:
    import torch

    torch.set_num_threads(1)  # a checkpoint that acts shares the machine with the other tasks
    return collect_chunk(plan, episodes, num_processes=num_processes)

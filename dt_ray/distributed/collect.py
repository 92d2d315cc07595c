"""Collecting episodes with Ray tasks, a few chunks at a time, written in order as they come."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import pyarrow as pa
import ray

from dt_ray.collection import CollectionPlan, collect_chunk
from dt_ray.distributed.cluster import user_errors


def collect_on_ray(plan: CollectionPlan, *, num_workers: int | None = None) -> Iterator[pa.Table]:
    """The tables of all chunks, in order; a few are under way at a time, so that memory stays bounded."""
    task = ray.remote(num_cpus=1, max_retries=3)(_collect)
    num_parallel = min(num_workers or max(1, int(ray.cluster_resources().get("CPU", 1))), plan.max_envs)
    waiting, running = deque(plan.chunks()), deque()
    with user_errors():
        while waiting or running:
            while waiting and len(running) < num_parallel:
                running.append(task.remote(plan, waiting.popleft(), num_parallel))
            yield ray.get(running.popleft())


def _collect(plan: CollectionPlan, episodes: range, num_processes: int) -> pa.Table:
    import torch

    torch.set_num_threads(1)  # a checkpoint that acts shares the machine with the other tasks
    return collect_chunk(plan, episodes, num_processes=num_processes)

"""Evaluation on Ray actors: each plays its share of the episodes, at all target returns, as one batch."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import ray

from dt_ray.config import EvaluationConfig, RunConfig
from dt_ray.distributed.actors import EpisodePlayer
from dt_ray.distributed.cluster import user_errors
from dt_ray.environments import try_environment
from dt_ray.errors import ResourceError
from dt_ray.evaluation import make_report
from dt_ray.learners import Policy


class EvaluationActors:
    """Actors that play evaluations, one after the other, while the caller does something else."""

    def __init__(
        self,
        actors: Sequence[Any],
        env_id: str,
        config: EvaluationConfig,
        env_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self.actors, self.env_id, self.config = list(actors), env_id, config
        self.env_kwargs = dict(env_kwargs or {})
        self._waiting = ThreadPoolExecutor(max_workers=1, thread_name_prefix="evaluation")

    @staticmethod
    def start(num_actors: int, *, num_cpus: float = 1) -> list[Any]:
        """Starts actors; a lost one is started again, and what it was playing is played again."""
        actor = ray.remote(num_cpus=num_cpus, max_restarts=-1, max_task_retries=-1, scheduling_strategy="SPREAD")(
            EpisodePlayer
        )
        return [actor.remote() for _ in range(num_actors)]

    def submit(self, policy: Policy, *, step: int) -> Future[dict[str, Any]]:
        """Begins an evaluation; its report is in the form of `evaluations/*.json`."""
        return self._waiting.submit(self._evaluate, policy, step)

    def _evaluate(self, policy: Policy, step: int) -> dict[str, Any]:
        began = time.perf_counter()
        shared = ray.put(policy)
        num_envs = max(1, self.config.max_envs // len(self.actors))
        settings = replace(self.config, max_envs=num_envs)  # of an actor
        shares = [range(i, self.config.num_episodes, len(self.actors)) for i in range(len(self.actors))]
        calls = [
            actor.play.remote(shared, self.env_id, settings, list(share), self.env_kwargs)
            for actor, share in zip(self.actors, shares, strict=True)
            if len(share)
        ]
        with user_errors():
            results = ray.get(calls)
        return make_report(results, self.env_id, self.config, step=step, wall_s=time.perf_counter() - began)


def try_environment_on_ray(config: RunConfig, actors: Sequence[Any] = ()) -> None:
    """Plays a little of the evaluation environment on each actor, or else in a task.

    Raises:
        BrokenEnvironmentError: it fails, or answers what no policy can act on.
        UnsupportedSpaceError: it can't be made there.
    """
    what = (config.env_id, config.env_kwargs, config.evaluation.seed)
    with user_errors():
        calls = [actor.try_environment.remote(*what) for actor in actors]  # no more than may be open at once
        ray.get(calls or _try_environment.remote(*what))


@ray.remote
def _try_environment(env_id: str, env_kwargs: Mapping[str, Any], seed: int) -> None:
    try_environment(env_id, env_kwargs, seed=seed)


def check_actors(num_actors: int) -> None:
    """Raises:
    ResourceError: the cluster has fewer CPUs than that; the actors would wait for ever.
    """
    cpus = ray.cluster_resources().get("CPU", 0)
    if num_actors > cpus:
        raise ResourceError(f"{num_actors} evaluation actors need a CPU each and there are {cpus:g}; ask for fewer")

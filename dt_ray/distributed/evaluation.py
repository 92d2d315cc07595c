"""Evaluation on Ray actors: each plays its share of the episodes, at all target returns, as one batch."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any, NamedTuple

import ray
from ray.exceptions import RayActorError, RayError, WorkerCrashedError

from dt_ray.config.schema import EvaluationConfig, RunConfig
from dt_ray.distributed.actors import EpisodePlayer
from dt_ray.distributed.cluster import user_errors
from dt_ray.distributed.usage import describe_free
from dt_ray.environments.batched import try_environment
from dt_ray.errors import EnvironmentCrashError, ResourceError
from dt_ray.learners import Policy
from dt_ray.play.evaluation import EpisodeResults, make_report, play
from dt_ray.runs.evaluation_report import EvaluationReport

log = logging.getLogger("dt_ray")

MAX_DEATHS = 3  # of actors that play the same episodes; one or two may be due to lost nodes
PLACED_WITHIN_S = 60.0  # if no actor is placed by then, the calling process plays the evaluation
ASK_AGAIN_S = 0.5
SAYS_EVERY_S = 300.0  # between two warnings that an evaluation still runs


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
        """Starts actors; a lost one is started again."""
        actor = ray.remote(num_cpus=num_cpus, max_restarts=-1, scheduling_strategy="SPREAD")(EpisodePlayer)
        return [actor.remote() for _ in range(num_actors)]

    def submit(self, policy: Policy, *, step: int) -> Future[EvaluationReport]:
        """Begins an evaluation; its report comes when the future is done.

        The future raises `EnvironmentCrashError` where the environment ends every process that plays it.
        """
        return self._waiting.submit(self._evaluate, policy, step)

    def end(self) -> None:
        for actor in self.actors:
            ray.kill(actor)

    def _evaluate(self, policy: Policy, step: int) -> EvaluationReport:
        began = time.perf_counter()
        num_shares = len(self.actors)  # fixed, because the last digits of results depend on the size of a batch
        shares = [range(i, self.config.num_episodes, num_shares) for i in range(num_shares)]
        shares = [list(share) for share in shares if len(share)]
        with user_errors():
            results = self._play(policy, shares)
        return make_report(results, self.env_id, self.config, step=step, wall_s=time.perf_counter() - began)

    def _placed_actors(self) -> list[Any]:
        """The actors that have started; waits for the first one."""
        deadline = time.monotonic() + PLACED_WITHIN_S
        while True:
            answers = {actor.is_ready.remote(): actor for actor in self.actors}
            ray.wait(list(answers), timeout=PLACED_WITHIN_S)
            done, _ = ray.wait(list(answers), num_returns=len(answers), timeout=0)
            placed = [answers[answer] for answer in done if _is_answered(answer)]
            if placed or time.monotonic() > deadline:
                return placed
            time.sleep(ASK_AGAIN_S)  # an actor that is being restarted refuses at once

    def _play(self, policy: Policy, shares: list[list[int]]) -> list[EpisodeResults]:
        """Plays all shares at once; that of a lost actor is played again. Without actors this process plays them."""
        shared, results = ray.put(policy), []
        playing: dict[ray.ObjectRef, Share] = {}

        def begin(share: Share, actors: list[Any]) -> None:
            if not actors and share.num_deaths:  # these episodes may have ended them, and would end this process
                raise self._ended_processes(share.num_deaths, share.episodes)
            if not actors:
                log.warning("no place for an evaluation actor (%s): evaluating here", describe_free())
                results.append(play(policy, self.env_id, self.config, share.episodes, self.env_kwargs))
                return
            actor = share.actor if share.actor in actors else actors[len(playing) % len(actors)]
            call = self._begin(actor, shared, share.episodes)
            playing[call] = share._replace(actor=actor)

        actors = self._placed_actors()
        for episodes in shares:
            begin(Share(None, episodes, 0), actors)
        while playing:
            done, _ = ray.wait(list(playing), timeout=SAYS_EVERY_S)
            if not done:
                episodes = sorted(episode for share in playing.values() for episode in share.episodes)
                log.warning("still playing %s with %s", self.env_id, self._seeds(episodes))
                continue
            share = playing.pop(done[0])
            try:
                results.append(ray.get(done[0]))
            except RayActorError:
                share = share._replace(num_deaths=share.num_deaths + 1)
                if share.num_deaths == MAX_DEATHS:
                    raise self._crash(shared, share) from None
                begin(share, self._placed_actors())
        return results

    def _begin(self, actor: Any, policy: ray.ObjectRef, episodes: list[int]) -> ray.ObjectRef:
        settings = replace(self.config, max_envs=max(1, self.config.max_envs // len(self.actors)))  # of an actor
        return actor.play.remote(policy, self.env_id, settings, episodes, self.env_kwargs)

    def _crash(self, policy: ray.ObjectRef, share: Share) -> EnvironmentCrashError:
        """Finds the episode that ends the process by bisection, and names its seed."""

        def survives(episodes: list[int]) -> bool:
            try:
                ray.get(self._begin(share.actor, policy, episodes))
            except RayActorError:
                self._placed_actors()
                return False
            return True

        found = find_crash(share.episodes, survives)
        return self._ended_processes(share.num_deaths, found)

    def _ended_processes(self, num_deaths: int, episodes: Sequence[int]) -> EnvironmentCrashError:
        return EnvironmentCrashError(
            f"{self.env_id} ended {num_deaths} processes one after the other that played it with "
            f"{self._seeds(episodes)}; play that episode by itself to see why, or evaluate with another evaluation.seed"
        )

    def _seeds(self, episodes: Sequence[int]) -> str:
        seeds = [self.config.seed + episode for episode in episodes]
        return f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {', '.join(map(str, seeds))}"


class Share(NamedTuple):
    """Episodes that an actor plays, and how many actors ended while playing them."""

    actor: Any
    episodes: list[int]
    num_deaths: int


def find_crash(episodes: list[int], survives: Callable[[list[int]], bool]) -> list[int]:
    """The one episode that ends its process, or all of them if each survives alone."""
    found = episodes
    while len(found) > 1:
        half = found[: len(found) // 2]
        found = found[len(half) :] if survives(half) else half
    return found if len(episodes) == 1 or not survives(found) else episodes


def _is_answered(answer: ray.ObjectRef) -> bool:
    try:
        return ray.get(answer, timeout=0)
    except RayError:
        return False


def try_environment_on_ray(config: RunConfig) -> None:
    """Plays a few steps of the environment in a task, as evaluations will.

    Raises:
        BrokenEnvironmentError: it fails, or its answers are malformed.
        EnvironmentCrashError: it ends its process.
        UnsupportedSpaceError: it can't be made there.
    """
    if config.env_id is None:
        return
    try:
        with user_errors():
            ray.get(_try_environment.remote(config.env_id, config.env_kwargs, config.evaluation.seed))
    except WorkerCrashedError:
        raise EnvironmentCrashError(
            f"{config.env_id} ended each process that played its first two steps with seed {config.evaluation.seed}"
        ) from None


@ray.remote(num_cpus=0)
def _try_environment(env_id: str, env_kwargs: Mapping[str, Any], seed: int) -> None:
    try_environment(env_id, env_kwargs, seed=seed)


def check_actors(num_actors: int) -> None:
    """Raises:
    ResourceError: the cluster has fewer CPUs than that; the actors would wait for ever.
    """
    cpus = ray.cluster_resources().get("CPU", 0)
    if num_actors > cpus:
        raise ResourceError(f"{num_actors} evaluation actors need a CPU each and there are {cpus:g}; ask for fewer")

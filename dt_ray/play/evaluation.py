"""Evaluations: plays the same seeded episodes for every target return and reports the returns reached."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from dt_ray.config.schema import EvaluationConfig
from dt_ray.errors import BrokenEnvironmentError
from dt_ray.learners.base import Policy
from dt_ray.play.rollout import rollout
from dt_ray.runs.evaluation_report import EvaluationReport, TargetResult
from dt_ray.runs.intervals import bootstrap_interval


@dataclass(frozen=True, kw_only=True)
class EpisodeResults:
    """Returns and lengths of some of an evaluation's episodes, for every target return."""

    episodes: Int[ndarray, "N"]
    returns: Float[ndarray, "targets N"]
    lengths: Int[ndarray, "targets N"]


def play(
    policy: Policy,
    env_id: str,
    config: EvaluationConfig,
    episodes: Sequence[int],
    env_kwargs: Mapping[str, Any] | None = None,
) -> EpisodeResults:
    """Plays the episodes with these numbers: all of them, at all target returns, as one batch of up to `max_envs`.

    Raises:
        BrokenEnvironmentError: the environment crashed, or answered what no policy can act on.
    """
    targets = config.target_returns
    rollouts = rollout(
        policy,
        env_id,
        seeds=[config.seed + episode for _ in targets for episode in episodes],
        target_returns=[target for target in targets for _ in episodes],
        max_timesteps=config.max_timesteps,
        batched=config.batched_env,
        env_kwargs=env_kwargs,
        max_envs=config.max_envs,
    )
    if len(unusable := np.flatnonzero(~np.isfinite(rollouts.returns))):
        seed = config.seed + episodes[unusable[0] % len(episodes)]
        raise BrokenEnvironmentError(
            f"the environment {env_id} gives rewards (seed {seed}) whose sum is {rollouts.returns[unusable[0]]}"
        )
    shape = (len(targets), len(episodes))
    return EpisodeResults(
        episodes=np.asarray(episodes),
        returns=rollouts.returns.reshape(shape),
        lengths=rollouts.lengths.reshape(shape),
    )


def evaluate(
    policy: Policy,
    env_id: str,
    config: EvaluationConfig,
    *,
    step: int,
    env_kwargs: Mapping[str, Any] | None = None,
) -> EvaluationReport:
    """Plays all episodes in this process and reports on them."""
    began = time.perf_counter()
    results = play(policy, env_id, config, range(config.num_episodes), env_kwargs)
    return make_report([results], env_id, config, step=step, wall_s=time.perf_counter() - began)


def make_report(
    results: Sequence[EpisodeResults], env_id: str, config: EvaluationConfig, *, step: int, wall_s: float
) -> EvaluationReport:
    """The report on these episodes, in their order, whoever played them.

    The episodes are the same however they were shared among actors. Their returns are so to rounding, which depends on
    how many are played as one batch: of -1,127 on Pendulum by 0.0005, and more where an environment is chaotic. As
    many actors give the same digits again, also where one was lost and its share is played anew.
    """
    order = np.argsort(np.concatenate([part.episodes for part in results]))
    returns = np.concatenate([part.returns for part in results], axis=1)[:, order]
    lengths = np.concatenate([part.lengths for part in results], axis=1)[:, order]
    return EvaluationReport(
        step=step,
        env_id=env_id,
        num_episodes=config.num_episodes,
        seed=config.seed,
        wall_s=round(wall_s, 3),
        env_steps_per_s=round(float(lengths.sum() / wall_s), 1),
        targets=tuple(
            TargetResult(
                target_return=target,
                return_mean=float(returns[i].mean()),
                return_std=float(returns[i].std()),
                return_ci95=bootstrap_interval(returns[i]),
                normalized_score=normalized_score(float(returns[i].mean()), config),
                episode_returns=tuple(returns[i].tolist()),
                episode_lengths=tuple(lengths[i].tolist()),
            )
            for i, target in enumerate(config.target_returns)
        ),
    )


def normalized_score(return_mean: float, config: EvaluationConfig) -> float | None:
    """0 at the environment's random return, 1 at its reference return; null where they aren't known."""
    if config.random_return is None or config.reference_return is None:
        return None
    return (return_mean - config.random_return) / (config.reference_return - config.random_return)

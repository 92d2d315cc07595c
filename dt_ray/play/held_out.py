"""Evaluation without an environment: held-out episodes are replayed, and the policy's actions compared with the log's.

Legend: E episodes, N steps, A action dimension.
"""

from __future__ import annotations

import time

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from dt_ray.config.schema import EvaluationConfig
from dt_ray.data.held_out import HeldOutEpisodes
from dt_ray.data.transitions import TransitionDataset
from dt_ray.learners.base import Policy
from dt_ray.runs.evaluation_report import ActionErrors, EvaluationReport, HeldOutResult

NUM_GROUPS = 5  # of steps, by number of the step and by return


def evaluate_held_out(
    policy: Policy, held_out: HeldOutEpisodes, config: EvaluationConfig, *, step: int
) -> EvaluationReport:
    """Compares a policy's actions with the logged ones at every step of held-out episodes.

    The target return is that of the episode. As in training, the policy sees the actions and rewards of the log.
    """
    began, data, units = time.perf_counter(), held_out.episodes, held_out.normalizer
    chosen = replay(policy, data)
    logged = units.normalize_actions(data.actions).astype(np.float64)
    cloning = held_out.cloning
    rivals = (units.normalize_actions(chosen), cloning.predict(data, units), cloning.mean)
    squares = np.stack([np.square(predicted - logged).mean(axis=1) for predicted in rivals])  # [3, N]
    wall_s = time.perf_counter() - began
    assert data.returns_to_go is not None
    returns = data.returns_to_go[data.starts].astype(np.float64)
    policy_error, cloning_error, constant_error = _errors(squares)
    return EvaluationReport(
        step=step,
        env_id=None,
        num_episodes=data.num_episodes,
        seed=config.seed,
        wall_s=round(wall_s, 3),
        env_steps_per_s=round(data.num_transitions / wall_s, 1),
        targets=(),
        held_out=HeldOutResult(
            num_steps=data.num_transitions,
            action_error=policy_error,
            cloning_error=cloning_error,
            constant_error=constant_error,
            by_step=_grouped(squares, data.timesteps.astype(np.float64)),
            by_return=_grouped(squares, np.repeat(returns, data.lengths)),
        ),
    )


def replay(policy: Policy, data: TransitionDataset) -> Float[ndarray, "N A"]:
    """The policy's action at each step of logged episodes, which are replayed side by side."""
    assert data.returns_to_go is not None
    chosen = np.zeros_like(data.actions)
    live = np.arange(data.num_episodes)
    policy.start(data.observations[data.starts], data.returns_to_go[data.starts].astype(np.float64))
    for step in range(int(data.lengths.max())):
        rows = data.starts[live] + step
        chosen[rows] = policy.act()
        goes_on = data.lengths[live] > step + 1
        if not goes_on.any():
            break
        if not goes_on.all():
            policy.keep(np.flatnonzero(goes_on))
            live, rows = live[goes_on], rows[goes_on]
        policy.observe(data.actions[rows], data.rewards[rows].astype(np.float64), data.observations[rows + 1])
    return chosen


def _grouped(squares: Float[ndarray, "3 N"], values: Float[ndarray, "N"]) -> tuple[ActionErrors, ...]:
    """The errors of about equally large groups of steps, formed by a value of each step."""
    edges = np.unique(np.quantile(values, np.linspace(0, 1, NUM_GROUPS + 1), method="nearest"))
    groups = np.searchsorted(edges[1:-1], values, side="right")
    found = []
    for group in np.unique(groups):
        of_group = groups == group
        errors = _errors(squares[:, of_group])
        low, high = float(values[of_group].min()), float(values[of_group].max())
        found.append(
            ActionErrors(
                lowest=low,
                highest=high,
                num_steps=int(of_group.sum()),
                action_error=errors[0],
                cloning_error=errors[1],
                constant_error=errors[2],
            )
        )
    return tuple(found)


def _errors(squares: Float[ndarray, "3 N"]) -> list[float]:
    return np.sqrt(squares.mean(axis=1)).tolist()

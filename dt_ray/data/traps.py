"""What a log hides: it can be trained on, and the policy would be wrong.

The environment's own dynamics, where it can be set to a state that its observation tells, decide about scales.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import gymnasium as gym
import numpy as np
from numpy import ndarray

from dt_ray.data.spaces import SpaceSpec
from dt_ray.data.transitions import TransitionDataset

NUM_REPLAYED = 200  # transitions
ROUNDING = 1e-3  # of an observation's standard deviation: what exact dynamics may miss the next one by
NOTICEABLE = 0.05  # other dynamics, whatever the actions

STATES: dict[str, Callable[[ndarray], ndarray]] = {  # environment -> its state out of an observation
    "Pendulum-v1": lambda observation: np.array([np.arctan2(observation[1], observation[0]), observation[2]]),
    "MountainCarContinuous-v0": lambda observation: observation.astype(np.float64),
}


def find_traps(data: TransitionDataset, spec: SpaceSpec | None = None, env_id: str | None = None) -> Iterator[str]:
    """One line for each thing that looks wrong, and the setting that mends it."""
    limit = gym.spec(env_id).max_episode_steps if env_id else None
    ended = data.terminated[data.ends - 1]
    lengths = data.lengths[ended]
    if limit is None and len(lengths) > 1 and (lengths == lengths[0]).all() and lengths[0] > 1:
        limit = int(lengths[0])
    if limit is not None and (num := int((lengths == limit).sum())):
        yield (
            f"{num} episode(s) are said to be ended by the environment at step {limit}, as a time limit does; "
            f"data.time_limit={limit} marks them as cut"
        )
    yield from _find_repeats(data)
    if spec is None or env_id is None:
        return
    low, high = np.asarray(spec.action_low), np.asarray(spec.action_high)
    if (errors := replay_errors(data, env_id, scales := sorted({1.0, float(high.max())}))) is not None:
        best = int(np.argmin(errors))
        if errors[best] > NOTICEABLE:
            yield (
                f"{env_id} does not go from these observations to the next ones by these actions (error "
                f"{errors[best]:.2g} of their spread): normalised, of another environment, or in another order"
            )
        elif errors[best] < errors[0] / 10 and errors[0] > ROUNDING:
            yield (
                f"the scale of the actions looks wrong: replayed in {env_id} they miss the next observation by "
                f"{errors[0]:.2g} of its spread, multiplied by {scales[best]:g} by {errors[best]:.2g}; "
                f"set data.action_scale={scales[best]:g}"
            )
    elif (np.abs(data.actions) <= 1).all() and (high > 1).any():
        yield (
            f"all actions are within [-1, 1] where {env_id} takes {low.tolist()}..{high.tolist()}; if they are "
            f"normalised, set data.action_scale={high.max():g}"
        )
    yield from _find_normalised(data, env_id)


def replay_errors(data: TransitionDataset, env_id: str, scales: list[float]) -> list[float] | None:
    """How far the environment's next observations lie from the logged ones, with the actions multiplied by each scale.

    The mean over transitions of the largest error of a dimension, in its standard deviations; None where the
    environment can't be set to the state that an observation tells.
    """
    inner = np.setdiff1d(np.arange(data.num_transitions), data.ends - 1)
    if env_id not in STATES or not len(inner):
        return None
    steps = np.random.default_rng(0).choice(inner, min(NUM_REPLAYED, len(inner)), replace=False)
    spread = data.observations.std(axis=0) + 1e-6
    env: Any = gym.make(env_id).unwrapped
    env.reset(seed=0)
    errors = []
    for scale in scales:
        missed = [np.abs(_step(env, env_id, data, i, scale) - data.observations[i + 1]) / spread for i in steps]
        errors.append(float(np.max(missed, axis=1).mean()))
    env.close()
    return errors


def _step(env: Any, env_id: str, data: TransitionDataset, step: int, scale: float) -> ndarray:
    env.state = STATES[env_id](data.observations[step])
    return env.step(data.actions[step] * np.float32(scale))[0]


def _find_repeats(data: TransitionDataset) -> Iterator[str]:
    rows = np.concatenate([data.observations, data.actions, data.rewards[:, None]], axis=1)
    same = (rows[1:] == rows[:-1]).all(axis=1)
    same[data.ends[:-1] - 1] = False
    if len(steps := np.flatnonzero(same)):
        episode = np.searchsorted(data.starts, steps[0], side="right") - 1
        yield (
            f"{len(steps)} row(s) repeat the one before, the first in episode {data.episode_ids[episode]} at step "
            f"{steps[0] + 1 - data.starts[episode]}: duplicates, unless nothing moved"
        )


def _find_normalised(data: TransitionDataset, env_id: str) -> Iterator[str]:
    space = gym.make(env_id).observation_space
    assert isinstance(space, gym.spaces.Box)
    margin = 1e-3 * np.where(np.isfinite(space.high - space.low), space.high - space.low, 0.0)
    outside = ((data.observations < space.low - margin) | (data.observations > space.high + margin)).any(axis=1)
    mean, std = data.observations.mean(axis=0), data.observations.std(axis=0)
    if outside.any():
        yield f"{outside.sum()} observation(s) lie outside what {env_id} can show: normalised ones, perhaps"
    elif data.observations.shape[1] > 1 and (np.abs(mean) < 0.02).all() and (np.abs(std - 1) < 0.02).all():
        yield "every observation has mean 0 and standard deviation 1: a policy acting on raw ones would fail"

"""Traps: problems of a log that can be trained on, but would give a wrong policy.

Where an environment can be set to the state of an observation, logged steps are replayed in it to check their scale.
The caller says which state that is; otherwise it is tried whether the observation itself is the state.

Legend: E episodes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Int
from numpy import ndarray

from dt_ray.data.logs.checks import are_choices, are_one_hot
from dt_ray.data.ranges import Ranges, range_traps
from dt_ray.data.row_traps import row_traps
from dt_ray.data.spaces import SpaceSpec, close_env, make_env, read_observation_bounds
from dt_ray.data.transitions import TransitionDataset

NUM_REPLAYED = 200  # transitions
ROUNDING = 1e-3  # of an observation's standard deviation: the error that exact dynamics may have
NOTICEABLE = 0.05  # of it: a larger error means other dynamics
SHARE_AT_LIMIT = 0.1  # of the ended episodes: a smaller share may end a step before the limit by chance
FEWEST_ALIKE = 5  # episodes that end at the same step; fewer may do so by chance

NUM_TRIED = 20  # steps of the environment's own that it must repeat from their observations
StateOf = Callable[[ndarray], ndarray]  # the state of an environment, out of its observation


@dataclass(frozen=True, kw_only=True)
class LogFacts:
    """Facts about a whole log, gathered part by part."""

    lengths: Int[ndarray, "E"]
    is_ended: Bool[ndarray, "E"]  # by the environment, as the log says
    has_rewards: bool  # that are not 0
    are_choices: bool  # all actions: see the functions of these names
    are_one_hot: bool
    ranges: Ranges

    @classmethod
    def of(cls, data: TransitionDataset) -> LogFacts:
        return cls(
            lengths=data.lengths,
            is_ended=data.terminated[data.ends - 1],
            has_rewards=bool(data.rewards.any()),
            are_choices=bool(are_choices(data.actions).all()),
            are_one_hot=bool(are_one_hot(data.actions).all()),
            ranges=Ranges.of(data),
        )

    @property
    def varies(self) -> bool:
        """Whether some action differs from another."""
        low, high = self.ranges.actions
        return bool((low < high).any())

    def joined(self, other: LogFacts) -> LogFacts:
        """Of the episodes of both."""
        return LogFacts(
            lengths=np.concatenate([self.lengths, other.lengths]),
            is_ended=np.concatenate([self.is_ended, other.is_ended]),
            has_rewards=self.has_rewards or other.has_rewards,
            are_choices=self.are_choices and other.are_choices,
            are_one_hot=self.are_one_hot and other.are_one_hot,
            ranges=self.ranges.joined(other.ranges),
        )


def all_traps(
    data: TransitionDataset,
    spec: SpaceSpec | None = None,
    env_id: str | None = None,
    env_kwargs: Mapping[str, Any] | None = None,
    *,
    state_of: StateOf | None = None,
) -> Iterator[str]:
    """One line for each thing that looks wrong, and the setting that mends it."""
    yield from log_traps(LogFacts.of(data), spec, env_id, env_kwargs)
    yield from step_traps(data, spec, env_id, env_kwargs, state_of=state_of)


def log_traps(
    facts: LogFacts,
    spec: SpaceSpec | None = None,
    env_id: str | None = None,
    env_kwargs: Mapping[str, Any] | None = None,
    columns: Mapping[str, str | None] | None = None,
) -> Iterator[str]:
    """One line for each trap of a log as a whole; `columns` is `data.columns`."""
    yield from _end_traps(facts, None if env_id is None else _time_limit(env_id, env_kwargs))
    if not facts.has_rewards:
        yield "every reward is 0: there is no return to reach, and none to tell good episodes from bad ones"
    if spec is None and facts.varies and facts.are_one_hot:
        yield (
            "every action is a one-hot vector, as a discrete action is: dt_ray trains on continuous ones only; if "
            "these are continuous, name their bounds by data.action_bounds"
        )
    yield from range_traps(facts.ranges, spec, columns)


def step_traps(
    data: TransitionDataset,
    spec: SpaceSpec | None = None,
    env_id: str | None = None,
    env_kwargs: Mapping[str, Any] | None = None,
    *,
    state_of: StateOf | None = None,
) -> Iterator[str]:
    """One line for each trap in the steps of these episodes."""
    yield from row_traps(data)
    if spec is None or env_id is None:
        return
    low, high = np.asarray(spec.action_low), np.asarray(spec.action_high)
    scales = sorted({1.0, float(high.max())} if spec.is_bounded else {1.0})
    if (errors := replay_errors(data, env_id, scales, env_kwargs, state_of=state_of)) is not None:
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
    elif spec.is_bounded and (np.abs(data.actions) <= 1).all() and (high > 1).any():
        yield (
            f"all actions are within [-1, 1] where {env_id} takes {low.tolist()}..{high.tolist()}; if they are "
            f"normalised, set data.action_scale={high.max():g}"
        )
    yield from _normalisation_traps(data, env_id, env_kwargs)


def _time_limit(env_id: str, env_kwargs: Mapping[str, Any] | None) -> int | None:
    env = make_env(env_id, env_kwargs)
    close_env(env)
    return None if env.spec is None else env.spec.max_episode_steps


def _end_traps(facts: LogFacts, limit: int | None) -> Iterator[str]:
    """Traps in the ends of episodes; `limit` is the environment's time limit in steps."""
    if limit is not None and (num := int((facts.lengths > limit).sum())):
        yield (
            f"{num} episode(s) are longer than the environment's limit of {limit} steps, the longest has "
            f"{facts.lengths.max()}: several in one, or of an environment with another limit, which "
            f"env_kwargs.max_episode_steps can set"
        )
    ended = facts.lengths[facts.is_ended]
    said = "episode(s) are said to be ended by the environment at step"
    if limit is not None and (num := int((ended == limit).sum())):
        yield f"{num} {said} {limit}, as a time limit does; data.time_limit={limit} marks them as cut"
        return
    if limit is not None and (num := int((ended == limit - 1).sum())) >= max(2, SHARE_AT_LIMIT * len(ended)):
        yield (
            f"{num} {said} {limit - 1}, one short of its limit of {limit}, as where the last step of an episode was "
            f"not logged; data.time_limit={limit - 1} marks them as cut"
        )
        return
    lengths, counts = np.unique(ended[ended > 1], return_counts=True)
    if len(counts) == 0:
        return
    step, num = int(lengths[counts.argmax()]), int(counts.max())
    if (num > 1 and num == len(ended)) or (num >= FEWEST_ALIKE and num >= len(ended) / 2):
        yield f"{num} {said} {step}, as a time limit does; data.time_limit={step} marks them as cut"


def replay_errors(
    data: TransitionDataset,
    env_id: str,
    scales: list[float],
    env_kwargs: Mapping[str, Any] | None = None,
    *,
    state_of: StateOf | None = None,
) -> list[float] | None:
    """The distance between replayed and logged next observations, with the actions multiplied by each scale.

    The mean over transitions of the largest error of a dimension, in its standard deviations; None where the
    environment can't be set to the state of an observation.
    """
    inner = np.setdiff1d(np.arange(data.num_transitions), data.ends - 1)
    if not len(inner):
        return None
    env: Any = make_env(env_id, env_kwargs).unwrapped
    state_of = state_of or (lambda observation: observation.astype(np.float64))
    errors: list[float] | None = None
    if _repeats_itself(env, state_of):
        steps = np.random.default_rng(0).choice(inner, min(NUM_REPLAYED, len(inner)), replace=False)
        spread = data.observations.std(axis=0) + 1e-6
        errors = []
        for scale in scales:
            actions = data.actions * np.float32(scale)
            found: list[ndarray] = [_step(env, state_of, data.observations[i], actions[i]) for i in steps]
            missed = np.abs(np.array(found) - data.observations[steps + 1]) / spread
            errors += [float(missed.max(axis=1).mean())]
    close_env(env)
    return errors


def _repeats_itself(env: Any, state_of: StateOf) -> bool:
    """Whether the environment, set to the states of its own observations, steps as it did."""
    try:
        env.action_space.seed(0)
        seen: list[ndarray] = [env.reset(seed=0)[0]]
        actions: list[ndarray] = []
        is_over = False
        while not is_over and len(actions) < NUM_TRIED:
            actions.append(env.action_space.sample())
            observation, _, is_over, *_ = env.step(actions[-1])
            seen.append(observation)
            if np.shape(env.state) != np.shape(state_of(observation)):
                return False
        env.reset(seed=1)
        # Backwards, so that what the environment keeps beside its state shows.
        again = [_step(env, state_of, seen[i], actions[i]) for i in reversed(range(len(actions)))][::-1]
    except Exception:  # whatever an environment may raise that has no such state
        return False
    tolerance = ROUNDING * (np.std(seen, axis=0) + 1e-6)
    return bool((np.abs(np.array(again) - seen[1:]) <= tolerance).all())


def _step(env: Any, state_of: StateOf, observation: ndarray, action: ndarray) -> ndarray:
    env.state = state_of(observation)
    return env.step(action)[0]


def _normalisation_traps(data: TransitionDataset, env_id: str, env_kwargs: Mapping[str, Any] | None) -> Iterator[str]:
    low, high = read_observation_bounds(env_id, env_kwargs)
    margin = 1e-3 * np.where(np.isfinite(high - low), high - low, 0.0)
    outside = ((data.observations < low - margin) | (data.observations > high + margin)).any(axis=1)
    mean, std = data.observations.mean(axis=0), data.observations.std(axis=0)
    if outside.any():
        yield f"{outside.sum()} observation(s) lie outside what {env_id} can show: normalised ones, perhaps"
    elif data.observations.shape[1] > 1 and (np.abs(mean) < 0.02).all() and (np.abs(std - 1) < 0.02).all():
        yield "every observation has mean 0 and standard deviation 1: a policy acting on raw ones would fail"

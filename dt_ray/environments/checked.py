"""Gymnasium's environments, with every answer checked.

Legend: N episodes, M those still live, S observation, A action dimension.
"""

from __future__ import annotations

import math
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray

from dt_ray.data.spaces import close_env, make_env
from dt_ray.environments.steps import Steps
from dt_ray.errors import BrokenEnvironmentError

STEP_API = "step() returns (observation, reward, terminated, truncated, info)"
RESET_API = "reset(*, seed=None, options=None) returns (observation, info)"


class GymnasiumEnvironments:
    """One Gymnasium environment per episode; every answer is checked, and faults are named with seed and step."""

    def __init__(self, env_id: str, num: int, env_kwargs: Mapping[str, Any] | None = None, **options: Any) -> None:
        self.env_id = env_id
        self.envs: list[gym.Env] = []
        try:
            for _ in range(num):
                self.envs.append(make_env(env_id, env_kwargs, **options))
        except BaseException:
            self.close()
            raise
        shape, observation_shape = self.envs[0].action_space.shape, self.envs[0].observation_space.shape
        assert shape is not None
        assert observation_shape is not None
        self.action_shape, self.observation_shape = shape, observation_shape
        self.seeds: list[int] = [0] * num
        self.num_steps = [0] * num

    def reset(self, seeds: Sequence[int]) -> Float[ndarray, "N S"]:
        """Begins an episode in the first environments, one for each seed."""
        observations = np.stack([self._reset(i, int(seed)) for i, seed in enumerate(seeds)])
        return self._finite(np.arange(len(seeds)), observations, np.zeros(len(seeds), bool))

    def step(self, live: Int[ndarray, "M"], actions: Float[ndarray, "M A"]) -> Steps:
        # A copy each: an environment that scales its action in place must not change what was logged.
        steps = [self._step(i, action.copy()) for i, action in zip(live, actions, strict=True)]
        observations, rewards, terminated, truncated = (np.array(column) for column in zip(*steps, strict=True))
        return Steps(
            observations=self._finite(live, observations, terminated),
            rewards=rewards,
            terminated=terminated,
            truncated=truncated,
        )

    def close(self) -> None:
        for env in self.envs:
            close_env(env)

    def _reset(self, i: int, seed: int) -> Float[ndarray, "S"]:
        self.seeds[i], self.num_steps[i] = seed, 0
        try:
            answer = self.envs[i].reset(seed=seed)
        except Exception as error:
            old = isinstance(error, TypeError) and "'seed'" in str(error)
            raise self._crashed(i, error, "reset", f"; in Gymnasium {RESET_API}" if old else "") from None
        if not (isinstance(answer, tuple) and len(answer) == 2 and isinstance(answer[1], Mapping)):
            raise self._fault(i, f"reset() returned {_describe(answer)}; in Gymnasium {RESET_API}")
        return self._observation(i, answer[0])

    def _step(self, i: int, action: Float[ndarray, "A"]) -> tuple[Float[ndarray, "S"], float, bool, bool]:
        self.num_steps[i] += 1
        try:
            answer = self.envs[i].step(action)
        except Exception as error:
            # A wrapper of Gymnasium's, as the one for time limits, takes the answer apart before we see it.
            old = isinstance(error, ValueError) and "expected 5, got 4" in str(error)
            hint = f"; it has the API of gym before 0.26, in Gymnasium {STEP_API}" if old else ""
            raise self._crashed(i, error, "step", hint) from None
        if not isinstance(answer, tuple | list) or len(answer) != 5:
            num = f"{len(answer)} values" if isinstance(answer, tuple | list) else _describe(answer)
            old = ", as in gym before 0.26" if isinstance(answer, tuple | list) and len(answer) == 4 else ""
            raise self._fault(i, f"step() returned {num}{old}; in Gymnasium {STEP_API}")
        observation, reward, terminated, truncated, _ = answer
        flags = (self._flag(i, "terminated", terminated), self._flag(i, "truncated", truncated))
        return self._observation(i, observation), self._reward(i, reward), *flags

    def _finite(
        self, live: Int[ndarray, "M"], observations: Float[ndarray, "M S"], terminated: Bool[ndarray, "M"]
    ) -> Float[ndarray, "M S"]:
        """Refuses observations that are not finite, except after termination, where nobody acts on them."""
        is_finite = np.isfinite(observations).all(axis=1)
        if not is_finite.all():
            observations[~is_finite & terminated] = np.nan
            for row in np.flatnonzero(~is_finite & ~terminated):
                values = observations[row].tolist()
                raise self._fault(int(live[row]), f"an observation that is not finite: {values}")
        return observations

    def _observation(self, i: int, value: Any) -> Float[ndarray, "S"]:
        try:
            observation = np.array(value, dtype=np.float32)  # a copy: some environments write into the same array
        except (TypeError, ValueError):
            raise self._fault(i, f"an observation of {_describe(value)}, which is no array of numbers") from None
        if observation.shape != self.observation_shape:
            raise self._fault(
                i, f"an observation of shape {observation.shape}; its observation_space has {self.observation_shape}"
            )
        return observation

    def _reward(self, i: int, value: Any) -> float:
        number = value if isinstance(value, float) else _one_number(value)
        if number is None:
            raise self._fault(i, f"a reward of {_describe(value)}; it is one number")
        if not math.isfinite(number):
            raise self._fault(i, f"a reward of {number}; it is a finite number")
        return number

    def _flag(self, i: int, name: str, value: Any) -> bool:
        if value is True or value is False:
            return value
        number = _one_number(value)
        if number not in (0.0, 1.0):
            raise self._fault(i, f"{name} is {_describe(value)}; it is true or false. In Gymnasium {STEP_API}")
        return bool(number)

    def _crashed(self, i: int, error: Exception, method: str, hint: str) -> BrokenEnvironmentError:
        last = traceback.extract_tb(error.__traceback__)[-1]
        reason = " ".join(str(error).split())
        raised = f"{type(error).__name__}: {reason}" if reason else type(error).__name__
        return self._fault(i, f"{method}() raised {raised} ({Path(last.filename).name}, line {last.lineno}){hint}")

    def _fault(self, i: int, what: str) -> BrokenEnvironmentError:
        place = f"seed {self.seeds[i]}, " + (f"step {self.num_steps[i]}" if self.num_steps[i] else "reset")
        return BrokenEnvironmentError(f"the environment {self.env_id} can't be played ({place}): {what}")


def _one_number(value: Any) -> float | None:
    """A number, or that of an array with one; None where it is neither."""
    try:
        array = np.asarray(value)
        return float(array.reshape(())) if array.size == 1 and array.dtype.kind in "biuf" else None
    except (TypeError, ValueError):
        return None


def _describe(value: Any) -> str:
    """A value in a few words."""
    if isinstance(value, np.ndarray):
        return f"an array of shape {value.shape}"
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)} value(s)"
    if isinstance(value, Mapping):
        return f"a {type(value).__name__}"
    text = repr(value)
    return text if len(text) <= 60 else f"a {type(value).__name__}"

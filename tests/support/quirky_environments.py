"""A tank that is to be kept at level 0, in the habits and with the faults of environments as people write them.

`Plain-v0` is the truth: those that mean the same give its observations, rewards and ends.
"""

from __future__ import annotations

from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box

FAULTY_STEP = 4  # at which late faults show


class Tank(gym.Env):
    """Six steps; the level drifts by what is pumped."""

    observation_space: Any = Box(-5, 5, (2,), np.float32)
    action_space: Any = Box(-1, 1, (1,), np.float32)
    num_open: ClassVar[int] = 0
    most_open: ClassVar[int] = 0

    def __init__(self, render_mode: str | None = None, drift: float = 0.1, num_steps: int = 6) -> None:
        self.drift, self.num_steps, self.is_open = drift, num_steps, True
        Tank.num_open += 1
        Tank.most_open = max(Tank.most_open, Tank.num_open)

    def close(self) -> None:
        Tank.num_open -= self.is_open
        self.is_open = False

    def observe(self) -> Any:
        return np.array([self.level, self.step_number / 10], np.float32)

    def reward(self) -> Any:
        return -abs(self.level)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.level, self.step_number = float(self.np_random.uniform(-1, 1)), 0
        return self.observe(), {}

    def step(self, action: Any) -> Any:
        self.step_number += 1
        self.level = float(np.clip(self.level + 0.5 * float(action[0]) + self.drift, -5, 5))
        return self.observe(), self.reward(), False, self.step_number == self.num_steps, {"level": self.level}


class ArrayReward(Tank):
    def reward(self) -> Any:
        return np.array([-abs(self.level)])


class Flags(Tank):
    def step(self, action: Any) -> Any:
        observation, reward, terminated, truncated, info = super().step(action)
        return observation, reward, np.int64(terminated), np.array([truncated]), info


class ListObservation(Tank):
    def observe(self) -> Any:
        return [self.level, self.step_number / 10]


class ReusedArray(Tank):
    """Writes every observation into the array that it gave at the reset."""

    def reset(self, **options: Any) -> Any:
        self.array, info = super().reset(**options)
        return self.array, info

    def step(self, action: Any) -> Any:
        self.array[:], *rest = super().step(action)
        return self.array, *rest


class ScalesActionInPlace(Tank):
    def step(self, action: Any) -> Any:
        before = action.copy()
        action *= 100
        return super().step(before)


class LostSimulator(Tank):
    def step(self, action: Any) -> Any:
        if self.step_number + 1 == FAULTY_STEP:
            raise RuntimeError("lost the simulator")
        return super().step(action)


class LateNan(Tank):
    def reward(self) -> Any:
        return float("nan") if self.step_number == FAULTY_STEP else 0.0


class LateNanObservation(Tank):
    def observe(self) -> Any:
        return np.array([self.level, np.nan if self.step_number == FAULTY_STEP else 0.0], np.float32)


class NoReward(Tank):
    def reward(self) -> Any:
        return None


class TwoRewards(Tank):
    def reward(self) -> Any:
        return np.array([0.0, 1.0])


class TextReward(Tank):
    def reward(self) -> Any:
        return "-1"


class OldReset(Tank):
    def reset(self, **options: Any) -> Any:
        return super().reset(**options)[0]


class ResetWithoutSeed(Tank):
    def reset(self) -> Any:  # type: ignore[override]
        return super().reset()


class OldStep(Tank):
    """The four values of gym before 0.26; its info is not empty."""

    def step(self, action: Any) -> Any:
        observation, reward, terminated, truncated, info = super().step(action)
        return observation, reward, terminated or truncated, info


class NothingFromStep(Tank):
    def step(self, action: Any) -> Any:
        super().step(action)


class InfoAsFlag(Tank):
    def step(self, action: Any) -> Any:
        observation, reward, terminated, truncated, info = super().step(action)
        return observation, reward, terminated, info, truncated


class FlatShape(Tank):
    def observe(self) -> Any:
        return np.array([[self.level, 0.0]], np.float32)


class ThreeNumbers(Tank):
    def observe(self) -> Any:
        return np.array([self.level, 0.0, 0.0], np.float32)


class NamedNumbers(Tank):
    def observe(self) -> Any:
        return {"level": self.level}


class NeedsFile(Tank):
    def __init__(self, file: str, render_mode: str | None = None) -> None:
        super().__init__(drift=float(file))


class Unlimited(Tank):
    action_space = Box(-np.inf, np.inf, (1,), np.float32)


class HalfLimited(Tank):
    action_space = Box(np.array([0], np.float32), np.array([np.inf], np.float32))


class LargestFloats(Tank):
    action_space = Box(-np.finfo(np.float32).max, np.finfo(np.float32).max, (1,), np.float32)


class FixedSecond(Tank):
    action_space = Box(np.array([-1, 0.25], np.float32), np.array([1, 0.25], np.float32))


def kinds() -> dict[str, type[Tank]]:
    found = {each.__name__: each for each in Tank.__subclasses__()}
    return {"Plain": Tank, **found}


for name, kind in kinds().items():
    if f"{name}-v0" not in gym.registry:
        gym.register(f"{name}-v0", kind)  # type: ignore[arg-type]
if "OldStepLimited-v0" not in gym.registry:
    gym.register("OldStepLimited-v0", OldStep, max_episode_steps=6)  # type: ignore[arg-type]


def pump(observation: Any, generator: Any) -> Any:
    """A behaviour for environments without action bounds."""
    return [0.8 * generator.uniform(-1, 1)]

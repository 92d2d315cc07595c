"""Many episodes of one environment, stepped together.

Legend: N episodes, M those still live, S observation, A action dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import gymnasium as gym
import numpy as np
from gymnasium.envs.registration import EnvSpec
from gymnasium.utils import seeding
from jaxtyping import Bool, Float, Int
from numpy import ndarray

from dt_ray.data.spaces import make_env


@dataclass(frozen=True, kw_only=True)
class Steps:
    """What one step of the live episodes gave."""

    observations: Float[ndarray, "M S"]
    rewards: Float[ndarray, "M"]  # float64
    terminated: Bool[ndarray, "M"]
    truncated: Bool[ndarray, "M"]


class Environments(Protocol):
    action_shape: tuple[int, ...]

    def reset(self, seeds: Sequence[int]) -> Float[ndarray, "N S"]:
        """Begins one episode for each seed."""
        ...

    def step(self, live: Int[ndarray, "M"], actions: Float[ndarray, "M A"]) -> Steps:
        """One step of the episodes at these places."""
        ...

    def close(self) -> None: ...


def make_environments(env_id: str, num: int, *, batched: bool = True) -> Environments:
    """N environments: a batched copy where there is an exact one and it is wanted, else N of Gymnasium's.

    Raises:
        UnsupportedSpaceError: no such environment, or what it needs is not installed.
    """
    if batched and env_id == "Pendulum-v1" and PendulumEnvironments.copies(gym.spec(env_id)):
        return PendulumEnvironments(num)
    return GymnasiumEnvironments(env_id, num)


class GymnasiumEnvironments:
    """One Gymnasium environment an episode."""

    def __init__(self, env_id: str, num: int) -> None:
        self.envs = [make_env(env_id) for _ in range(num)]
        shape = self.envs[0].action_space.shape
        assert shape is not None
        self.action_shape = shape

    def reset(self, seeds: Sequence[int]) -> Float[ndarray, "N S"]:
        first = [env.reset(seed=seed)[0] for env, seed in zip(self.envs, seeds, strict=True)]
        return np.stack(first).astype(np.float32)

    def step(self, live: Int[ndarray, "M"], actions: Float[ndarray, "M A"]) -> Steps:
        steps = [self.envs[i].step(action)[:4] for i, action in zip(live, actions, strict=True)]
        observations, rewards, terminated, truncated = zip(*steps, strict=True)
        return Steps(
            observations=np.stack(observations).astype(np.float32),
            rewards=np.array([float(reward) for reward in rewards]),
            terminated=np.array(terminated, dtype=bool),
            truncated=np.array(truncated, dtype=bool),
        )

    def close(self) -> None:
        for env in self.envs:
            env.close()


class PendulumEnvironments:
    """Gymnasium's `Pendulum-v1` in NumPy, every step of every episode bit for bit what it gives by itself."""

    action_shape: tuple[int, ...] = (1,)
    max_episode_steps = 200
    max_speed, max_torque, dt, gravity = 8.0, 2.0, 0.05, 10.0

    @classmethod
    def copies(cls, spec: EnvSpec) -> bool:
        """Whether this is the environment that Gymnasium registers, not one that somebody put in its place."""
        is_same = spec.entry_point == "gymnasium.envs.classic_control.pendulum:PendulumEnv"
        return is_same and not spec.kwargs and spec.max_episode_steps == cls.max_episode_steps

    def __init__(self, num: int) -> None:
        self.angles, self.velocities = np.zeros(num), np.zeros(num)  # float64, as Gymnasium's state
        self.num_steps = 0

    def reset(self, seeds: Sequence[int]) -> Float[ndarray, "N S"]:
        high = np.array([np.pi, 1.0])
        states = np.array([seeding.np_random(seed)[0].uniform(-high, high) for seed in seeds])
        self.angles, self.velocities = states.T.copy()
        self.num_steps = 0
        return self._observe(slice(None))

    def step(self, live: Int[ndarray, "M"], actions: Float[ndarray, "M A"]) -> Steps:
        angles, velocities = self.angles[live], self.velocities[live]
        torques = np.clip(actions[:, 0], -self.max_torque, self.max_torque)
        from_upright = (angles + np.pi) % (2 * np.pi) - np.pi
        costs = _squares(from_upright) + 0.1 * _squares(velocities) + 0.001 * _squares(torques)
        velocities = velocities + (1.5 * self.gravity * np.sin(angles) + 3.0 * torques) * self.dt
        self.velocities[live] = np.clip(velocities, -self.max_speed, self.max_speed)
        self.angles[live] = angles + self.velocities[live] * self.dt
        self.num_steps += 1
        return Steps(
            observations=self._observe(live),
            rewards=-costs,
            terminated=np.zeros(len(live), dtype=bool),
            truncated=np.full(len(live), self.num_steps >= self.max_episode_steps),
        )

    def close(self) -> None:
        pass

    def _observe(self, live: slice | Int[ndarray, "M"]) -> Float[ndarray, "M S"]:
        angles, velocities = self.angles[live], self.velocities[live]
        return np.stack([np.cos(angles), np.sin(angles), velocities], axis=1).astype(np.float32)


def _squares(values: Float[ndarray, "M"]) -> Float[ndarray, "M"]:
    """Squares of scalars, as Gymnasium takes them: by C's `pow`, which can differ from a product in the last bit."""
    return np.array([value**2 for value in values])

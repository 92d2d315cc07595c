"""All that is specific to Pendulum: reference returns, behaviours, and an exact batched copy of Gymnasium's.

Legend: N episodes, M those still live, S observation, A action dimension.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.utils import seeding
from jaxtyping import Float, Int
from numpy import ndarray

from dt_ray.environments.steps import Steps

ENV_ID = "Pendulum-v1"
RANDOM_RETURN = -1197.0  # uniform actions, seeds 0..99
REFERENCE_RETURN = -132.4  # the best control found for seeds 0..99
# Behaviours to collect with: chance of a random action at each step of an episode; None: drawn for each episode.
RANDOMNESS: dict[str, float | None] = {"expert": 0.0, "medium": 0.65, "mixed": None}


def swing_up(observations: Float[ndarray, "N 3"]) -> Float[ndarray, "N 1"]:
    """Torques that swing Pendulum-v1 up by its energy and hold it there with a linear controller.

    Energy shaping after Åström and Furuta (2000), with E = v²/2 + 15 (cos θ - 1), 0 at rest upright. The gains were
    searched at random on 800 seeds from 100,000: mean return -145 there, and -139 on the seeds 0..99, where the best
    control known reaches -132.
    """
    angle = np.arctan2(observations[:, 1], observations[:, 0])
    velocity = observations[:, 2]
    missing = 1.70 + 0.19 * np.abs(angle) - (velocity**2 / 2 + 15 * (np.cos(angle) - 1))
    # Near a turning point gravity says where the next swing goes; elsewhere the velocity does.
    direction = np.where(np.abs(velocity) < 0.6, np.where(angle > 0, 1.0, -1.0), np.sign(velocity))
    pump = 0.6 * np.maximum(np.abs(velocity), 0.6) * direction * missing
    hold = -(16.4 * angle + 4.78 * velocity)
    return np.clip(np.where(np.abs(hold) < 7.1, hold, pump), -2.0, 2.0)[:, None]


def state_of(observation: Float[ndarray, "3"]) -> Float[ndarray, "2"]:
    """The angle and the velocity of an observation."""
    return np.array([np.arctan2(observation[1], observation[0]), observation[2]])


class PendulumEnvironments:
    """Gymnasium's `Pendulum-v1` in NumPy, every step of every episode bit for bit what it gives by itself."""

    action_shape: tuple[int, ...] = (1,)
    max_episode_steps = 200
    max_speed, max_torque, dt, gravity = 8.0, 2.0, 0.05, 10.0

    @classmethod
    def copies(cls, env_id: str, env_kwargs: Mapping[str, Any] | None = None) -> bool:
        """Whether this id is Gymnasium's own Pendulum-v1, without other arguments or another registration."""
        if env_id != ENV_ID or env_kwargs:
            return False
        spec = gym.spec(env_id)
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

"""Environments that end the process that plays them."""

import os
from typing import Any

import gymnasium
import numpy as np

DEADLY_SEED = 3


class Deadly(gymnasium.Env):
    """Pendulum's spaces; an episode that begins with `DEADLY_SEED` does not come to its first step."""

    observation_space = gymnasium.spaces.Box(-8, 8, (3,), np.float32)
    action_space = gymnasium.spaces.Box(-2, 2, (1,), np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        if seed == DEADLY_SEED:
            os._exit(13)
        return np.zeros(3, np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        return np.zeros(3, np.float32), -1.0, False, False, {}


gymnasium.register("Deadly-v0", Deadly)  # type: ignore[arg-type]

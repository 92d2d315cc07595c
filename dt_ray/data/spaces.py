"""What an environment takes and gives: dimensions and action bounds, for continuous vectors only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np

from dt_ray.errors import UnsupportedSpaceError


@dataclass(frozen=True, kw_only=True)
class SpaceSpec:
    """Dimensions, and the bounds of each action dimension in the environment's units."""

    observation_dim: int
    action_dim: int
    action_low: tuple[float, ...]
    action_high: tuple[float, ...]


def make_env(env_id: str, **options: Any) -> gym.Env:
    """A Gymnasium environment by its id.

    Raises:
        UnsupportedSpaceError: no such environment, or what it needs is not installed.
    """
    try:
        # The checker wraps every step; rollouts do the one check they need themselves.
        return gym.make(env_id, disable_env_checker=True, **options)
    except (gym.error.Error, ImportError) as error:
        raise UnsupportedSpaceError(f"can't make the environment {env_id!r}: {error}") from None


def read_spaces(env_id: str) -> SpaceSpec:
    """The dimensions and bounds of an environment.

    Raises:
        UnsupportedSpaceError: discrete actions, images or other observations that are no 1-D `Box`, unbounded actions.
    """
    env = make_env(env_id)
    observations, actions = env.observation_space, env.action_space
    env.close()
    for kind, space in (("observations", observations), ("actions", actions)):
        if (
            not isinstance(space, gym.spaces.Box)
            or len(space.shape) != 1
            or not np.issubdtype(space.dtype, np.floating)
        ):
            raise UnsupportedSpaceError(
                f"{env_id} has {kind} {space}; dt_ray trains on vector observations and continuous actions only "
                f"(a 1-D Box of floats), no discrete actions and no images"
            )
    assert isinstance(observations, gym.spaces.Box)
    assert isinstance(actions, gym.spaces.Box)
    if not (np.isfinite(actions.low).all() and np.isfinite(actions.high).all()):
        raise UnsupportedSpaceError(f"{env_id} has unbounded actions {actions}; wrap it in a RescaleAction with bounds")
    return SpaceSpec(
        observation_dim=observations.shape[0],
        action_dim=actions.shape[0],
        action_low=tuple(actions.low.tolist()),
        action_high=tuple(actions.high.tolist()),
    )

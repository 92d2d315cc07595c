"""Many episodes of one environment, stepped together.

Legend: N episodes, M those still live, S observation, A action dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import gymnasium as gym
import numpy as np
from jaxtyping import Float
from numpy import ndarray

from dt_ray.config.derived import EnvironmentFacts
from dt_ray.data.spaces import close_env, make_env, read_spaces
from dt_ray.environments import pendulum
from dt_ray.environments.checked import GymnasiumEnvironments
from dt_ray.environments.pendulum import PendulumEnvironments
from dt_ray.environments.reference_returns import reference_returns
from dt_ray.environments.steps import Environments

NUM_TRIED_STEPS = 2


def make_environments(
    env_id: str, num: int, *, batched: bool = True, env_kwargs: Mapping[str, Any] | None = None, **options: Any
) -> Environments:
    """N environments: a batched copy where there is an exact one and it is wanted, else N of Gymnasium's.

    `options` go to `gymnasium.make`.

    Raises:
        UnsupportedSpaceError: no such environment, or what it needs is not installed.
    """
    if batched and is_batched(env_id, env_kwargs):
        return PendulumEnvironments(num)
    return GymnasiumEnvironments(env_id, num, env_kwargs, **options)


def is_batched(env_id: str, env_kwargs: Mapping[str, Any] | None = None) -> bool:
    """Whether there is an exact batched copy of an environment, which opens none of Gymnasium's."""
    return PendulumEnvironments.copies(env_id, env_kwargs)


def known_state_of(env_id: str | None) -> Callable[[Float[ndarray, "S"]], ndarray] | None:
    """What makes an environment's state of an observation, where that is known and is not the observation itself."""
    return pendulum.state_of if env_id == pendulum.ENV_ID else None


def read_environment(env_id: str, env_kwargs: Mapping[str, Any] | None = None) -> EnvironmentFacts:
    """Facts about an environment: its own, and published returns.

    Raises:
        UnsupportedSpaceError: it can't be made, or is out of scope.
    """
    spec = read_spaces(env_id, env_kwargs)
    env = make_env(env_id, env_kwargs)
    limit = env.spec.max_episode_steps if env.spec is not None else None
    close_env(env)
    # Others than the plain environment may reward otherwise.
    known = None if env_kwargs else reference_returns(env_id)
    return EnvironmentFacts(
        env_id=env_id,
        time_limit=limit,
        has_bounds=spec.is_bounded,
        action_low=spec.action_low,
        action_high=spec.action_high,
        reference_returns=known and (known.random, known.reference),
        reference_source=known.source if known else "",
    )


def try_environment(env_id: str, env_kwargs: Mapping[str, Any] | None = None, *, seed: int = 0) -> None:
    """Plays a reset, two steps and another reset, as an evaluation would, so that a fault shows before a training.

    Raises:
        BrokenEnvironmentError: the environment fails, or answers what no policy can act on.
        UnsupportedSpaceError: it can't be made.
    """
    envs = GymnasiumEnvironments(env_id, 1, env_kwargs)
    try:
        envs.reset([seed])
        space = envs.envs[0].action_space
        assert isinstance(space, gym.spaces.Box)
        low, high = (np.clip(bound, -1.0, 1.0) for bound in (space.low, space.high))
        action = np.clip((low + high) / 2, space.low, space.high).astype(np.float32)
        for _ in range(NUM_TRIED_STEPS):
            steps = envs.step(np.zeros(1, np.int64), action[None])
            if steps.terminated[0] or steps.truncated[0]:
                break
        envs.reset([seed])
    finally:
        envs.close()

"""Dimensions and action bounds of environments and logs, for continuous vectors only."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import gymnasium as gym
import numpy as np
from jaxtyping import Float
from numpy import ndarray

from dt_ray.config.schema import ActionBounds
from dt_ray.errors import ConfigError, UnsupportedSpaceError

log = logging.getLogger("dt_ray")

EXTRAS = ("mujoco", "box2d")  # extras of dt_ray that are named like the package that Gymnasium misses
WIDEST_BOUNDS = 1e15  # larger bounds, such as 1e30 or the largest float32, mean that there is none


@dataclass(frozen=True, kw_only=True)
class SpaceSpec:
    """Dimensions, and the bounds of each action dimension in the environment's units."""

    observation_dim: int
    action_dim: int
    action_low: tuple[float, ...]
    action_high: tuple[float, ...]

    @property
    def is_bounded(self) -> bool:
        """Whether every action has bounds that mean something: finite, and far from what a float32 can hold."""
        bounds = np.array([self.action_low, self.action_high])
        return bool((np.abs(bounds) < WIDEST_BOUNDS).all())  # false for NaN too

    def with_bounds(self, low: Sequence[float], high: Sequence[float]) -> SpaceSpec:
        return replace(self, action_low=tuple(map(float, low)), action_high=tuple(map(float, high)))


def needed_environment(env_id: str | None, what: str) -> str:
    """The environment that `what` needs.

    Raises:
        ConfigError: the run has none.
    """
    if env_id is None:
        raise ConfigError(
            f"{what} needs an environment, and this run has none (env_id=null): it is evaluated on held-out episodes "
            f"of its log"
        )
    return env_id


def make_env(env_id: str, env_kwargs: Mapping[str, Any] | None = None, **options: Any) -> gym.Env:
    """A Gymnasium environment by its id; `env_kwargs` and `options` are arguments of its constructor.

    Raises:
        UnsupportedSpaceError: no such environment, its constructor fails, or what it needs is not installed.
    """
    try:
        # The checker wraps every step; rollouts do the one check they need themselves.
        return gym.make(env_id, **{"disable_env_checker": True, **(env_kwargs or {}), **options})
    except Exception as error:  # whatever a constructor may raise
        hint = ""
        if isinstance(error, TypeError) and not isinstance(error, gym.error.Error):
            hint = f"; env_kwargs gives it arguments, e.g. env_kwargs.NAME=VALUE (now {dict(env_kwargs or {})})"
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, (gym.error.DependencyNotInstalled, ImportError)):
            extra = next((name for name in EXTRAS if name in reason.lower()), None)
            hint = f'; here: pip install "dt-ray[{extra}]"' if extra else ""
        kind = "" if isinstance(error, (gym.error.Error, ImportError)) else f"{type(error).__name__}: "
        raise UnsupportedSpaceError(f"can't make the environment {env_id!r}: {kind}{reason}{hint}") from None


def close_env(env: gym.Env) -> None:
    """Closes an environment; a failure is only logged, since its work is done."""
    try:
        env.close()
    except Exception as error:
        log.warning("%s failed to close: %s: %s", env, type(error).__name__, error)


def read_spaces(env_id: str, env_kwargs: Mapping[str, Any] | None = None) -> SpaceSpec:
    """The dimensions and bounds of an environment; bounds may be infinite.

    Raises:
        UnsupportedSpaceError: discrete actions, images or other observations that are no 1-D `Box`.
    """
    env = make_env(env_id, env_kwargs)
    try:
        observations, actions = env.observation_space, env.action_space
    except AttributeError as error:
        raise UnsupportedSpaceError(f"{env_id} has no observation_space or action_space: {error}") from None
    finally:
        close_env(env)
    for kind, space in (("observations", observations), ("actions", actions)):
        if not isinstance(space, gym.spaces.Box) or len(space.shape) != 1 or not _has_floats(space):
            raise UnsupportedSpaceError(
                f"{env_id} has {kind} {space}; dt_ray trains on vector observations and continuous actions only "
                f"(a 1-D Box of floats), no discrete actions and no images"
            )
    bounds: Any = actions
    return SpaceSpec(
        observation_dim=_dimension(observations),
        action_dim=_dimension(actions),
        action_low=tuple(bounds.low.tolist()),
        action_high=tuple(bounds.high.tolist()),
    )


def _has_floats(space: Any) -> bool:
    return space.dtype.kind == "f"


def _dimension(space: gym.Space[Any]) -> int:
    assert space.shape is not None
    return space.shape[0]


def spaces_of_log(observation_dim: int, action_dim: int) -> SpaceSpec:
    """The spaces of a log without an environment: its dimensions, and infinite bounds of actions."""
    infinite = (np.inf,) * action_dim
    return SpaceSpec(
        observation_dim=observation_dim,
        action_dim=action_dim,
        action_low=tuple(-bound for bound in infinite),
        action_high=infinite,
    )


def read_observation_bounds(
    env_id: str, env_kwargs: Mapping[str, Any] | None = None
) -> tuple[Float[ndarray, "S"], Float[ndarray, "S"]]:
    """The lowest and highest observations that an environment says it can show; may be infinite."""
    env = make_env(env_id, env_kwargs)
    space: Any = env.observation_space
    close_env(env)
    return space.low, space.high


def choose_bounds(spec: SpaceSpec, bounds: ActionBounds, *, env_id: str | None) -> SpaceSpec:
    """The environment's spaces with the action bounds that `data.action_bounds` gives; `data` changes nothing yet.

    Raises:
        UnsupportedSpaceError: the environment's bounds are asked for and are none, or the ones given don't fit it.
    """
    if bounds == "data":  # `with_data_bounds` sets these when the log is read
        return spec
    if bounds == "environment":
        if not spec.is_bounded:
            whose = f"the actions of {env_id} have no usable bounds ({_show_bounds(spec)})"
            if env_id is None:
                whose = "there is no environment (env_id=null) whose action bounds could be taken"
            raise UnsupportedSpaceError(
                f"{whose}; a policy acts within bounds. "
                f"Set data.action_bounds=data for the smallest and largest actions of the log, or give them: "
                f"data.action_bounds=[[-1],[1]] (lowest, highest; a number for each dimension)"
            )
        return spec
    low, high = bounds
    if len(low) != spec.action_dim or len(high) != spec.action_dim:
        raise UnsupportedSpaceError(
            f"data.action_bounds: [lowest, highest] with {spec.action_dim} number(s) each, as many as "
            f"{env_id or 'the log'} has, got {list(map(list, bounds))}"
        )
    chosen = spec.with_bounds(low, high)
    outside = np.less(low, spec.action_low).any() or np.greater(high, spec.action_high).any()
    if not chosen.is_bounded or np.greater(low, high).any() or outside:
        raise UnsupportedSpaceError(
            f"data.action_bounds: the lowest must not be above the highest, and both within the bounds of "
            f"{env_id or 'the log'}, {_show_bounds(spec)}; got {_show_bounds(chosen)}"
        )
    return chosen


def with_data_bounds(
    spec: SpaceSpec, bounds: ActionBounds, lowest: Float[ndarray, "A"], highest: Float[ndarray, "A"]
) -> SpaceSpec:
    """The spaces with the range of the logged actions as bounds where `data.action_bounds=data`, never past the
    environment's own."""
    if bounds != "data":
        return spec
    low, high = (np.clip(values, spec.action_low, spec.action_high).tolist() for values in (lowest, highest))
    return spec.with_bounds(low, high)


def misfit_of(trained: SpaceSpec, bounds: ActionBounds, here: SpaceSpec) -> str | None:
    """Why a policy trained with these spaces can't act in an environment; None where it can.

    `bounds` is its `data.action_bounds`.
    """
    dimensions = ("observation_dim", "action_dim")
    if any(getattr(trained, name) != getattr(here, name) for name in dimensions):
        return f"the policy was trained for {trained}"
    if bounds == "environment":
        return None if trained == here else f"the policy was trained for {trained}"
    outside = np.less(trained.action_low, here.action_low) | np.greater(trained.action_high, here.action_high)
    return f"the policy acts within {_show_bounds(trained)}" if outside.any() else None


def _show_bounds(spec: SpaceSpec) -> str:
    return f"{[float(f'{x:.6g}') for x in spec.action_low]} to {[float(f'{x:.6g}') for x in spec.action_high]}"

"""Behaviours that act while a dataset is collected: policies without learning.

Each is a `Policy` for a batch of live episodes; its noise is drawn per episode from the episode's own seed, so that the
same episodes come out however they are spread over processes.

Legend: N live episodes, S observation, A action dimension.
"""

from __future__ import annotations

import importlib
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from dt_ray.data.spaces import SpaceSpec
from dt_ray.environments import pendulum
from dt_ray.errors import UserError

Controller = Callable[[Float[ndarray, "N S"]], Float[ndarray, "N A"]]

MIXED_POWER = 4  # of a uniform draw: all of 0..1 occurs, half of the episodes are below 6%, one in eight above 60%
NAMES = ("random", *pendulum.RANDOMNESS)


def make_behavior(name: str, env_id: str, spec: SpaceSpec, *, seeds: Sequence[int]) -> NoisyBehavior | FunctionBehavior:
    """The behaviour called `name`, for the episodes with these seeds.

    Raises:
        UserError: no such behaviour, or one that this environment doesn't have.
    """
    if name == "random":
        return NoisyBehavior(None, spec, seeds=seeds, randomness=1.0)
    if name in pendulum.RANDOMNESS:
        if not env_id.startswith(pendulum.ENV_ID.partition("-")[0]):
            raise UserError(
                f"the behaviour {name!r} exists for {pendulum.ENV_ID} only, not for {env_id}; use random, "
                f"a run of ours, or module:function"
            )
        return NoisyBehavior(pendulum.swing_up, spec, seeds=seeds, randomness=pendulum.RANDOMNESS[name])
    if ":" in name:
        return FunctionBehavior(load_function(name), name, seeds=seeds)
    raise UserError(
        f"no behaviour {name!r}; it is one of {', '.join(NAMES)}, a run or checkpoint of ours, or module:function"
    )


def load_function(name: str) -> Callable[..., Any]:
    """The function meant by `module:function`."""
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise UserError(f"can't load the behaviour {name!r}: {error}") from None


class NoisyBehavior:
    """A controller whose action is replaced, with a chance of `randomness` at each step, by a uniform one."""

    def __init__(
        self, controller: Controller | None, spec: SpaceSpec, *, seeds: Sequence[int], randomness: float | None
    ) -> None:
        self.controller = controller
        self.low, self.high = np.asarray(spec.action_low), np.asarray(spec.action_high)
        self.generators = _generators(seeds)
        self.randomness = np.array(
            [g.random() ** MIXED_POWER if randomness is None else randomness for g in self.generators]
        )

    def start(self, observations: Float[ndarray, "N S"], target_returns: Float[ndarray, "N"]) -> None:
        self.observations = observations

    def act(self) -> Float[ndarray, "N A"]:
        draws = np.stack([g.random(1 + len(self.low)) for g in self.generators])
        actions = self.low + draws[:, 1:] * (self.high - self.low)
        if self.controller is not None:
            chosen = self.controller(self.observations)
            actions = np.where((draws[:, 0] < self.randomness)[:, None], actions, chosen)
        return actions.astype(np.float32)

    def observe(self, actions: ndarray, rewards: ndarray, observations: Float[ndarray, "N S"]) -> None:
        self.observations = observations

    def keep(self, episodes: Sequence[int] | Int[ndarray, "M"]) -> None:
        self.observations, self.randomness = self.observations[episodes], self.randomness[episodes]
        self.generators = [self.generators[i] for i in episodes]


class FunctionBehavior:
    """A user's function of one observation [S] and a random generator, which returns one action [A]."""

    def __init__(
        self, function: Callable[[ndarray, np.random.Generator], Any], name: str, *, seeds: Sequence[int]
    ) -> None:
        self.function, self.name = function, name
        self.generators = _generators(seeds)

    def start(self, observations: Float[ndarray, "N S"], target_returns: Float[ndarray, "N"]) -> None:
        self.observations = observations

    def act(self) -> Float[ndarray, "N A"]:
        pairs = zip(self.observations, self.generators, strict=True)
        try:
            actions = [np.asarray(self.function(seen, generator), np.float32) for seen, generator in pairs]
            return np.stack(actions).reshape(len(actions), -1)
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            raise UserError(
                f"the behaviour {self.name} gives no action: {type(error).__name__}: {error} ({last.filename}, line "
                f"{last.lineno}); it takes an observation and a random generator, and returns one action"
            ) from None

    def observe(self, actions: ndarray, rewards: ndarray, observations: Float[ndarray, "N S"]) -> None:
        self.observations = observations

    def keep(self, episodes: Sequence[int] | Int[ndarray, "M"]) -> None:
        self.observations = self.observations[episodes]
        self.generators = [self.generators[i] for i in episodes]


def _generators(seeds: Sequence[int]) -> list[np.random.Generator]:
    return [np.random.default_rng([seed, 1]) for seed in seeds]  # 1: a stream apart from the environment's own

"""Who acts while a dataset is collected: policies that need no learning.

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
from dt_ray.errors import UserError

Controller = Callable[[Float[ndarray, "N S"]], Float[ndarray, "N A"]]

# Chance of a random action at each step of an episode; None: drawn for each episode.
PENDULUM_RANDOMNESS: dict[str, float | None] = {"expert": 0.0, "medium": 0.65, "mixed": None}
MIXED_POWER = 4  # of a uniform draw: all of 0..1 occurs, half of the episodes are below 6%, one in eight above 60%
NAMES = ("random", *PENDULUM_RANDOMNESS)


def make_behavior(name: str, env_id: str, spec: SpaceSpec, *, seeds: Sequence[int]) -> NoisyBehavior | FunctionBehavior:
    """The behaviour called `name`, for the episodes with these seeds.

    Raises:
        UserError: no such behaviour, or one that this environment doesn't have.
    """
    if name == "random":
        return NoisyBehavior(None, spec, seeds=seeds, randomness=1.0)
    if name in PENDULUM_RANDOMNESS:
        if not env_id.startswith("Pendulum"):
            raise UserError(
                f"the behaviour {name!r} exists for Pendulum-v1 only, not for {env_id}; use random, "
                f"a run of ours, or module:function"
            )
        return NoisyBehavior(swing_up, spec, seeds=seeds, randomness=PENDULUM_RANDOMNESS[name])
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

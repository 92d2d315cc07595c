"""Between the environment's units and the model's: standardised observations, actions in [-1, 1], scaled returns."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from dt_ray.data.returns import ReturnRecursion, bounds_by_timestep
from dt_ray.data.spaces import SpaceSpec
from dt_ray.data.transitions import TransitionDataset


@dataclass(frozen=True, kw_only=True)
class Normalizer:
    """Fitted on the training split, and kept in the checkpoint: a policy never sees other statistics."""

    observation_mean: Float[ndarray, "S"]
    observation_std: Float[ndarray, "S"]
    action_low: Float[ndarray, "A"]
    action_high: Float[ndarray, "A"]
    return_scale: float
    discount: float = 1.0  # of returns-to-go
    to_go_bounds: Float[ndarray, "2 K"] = field(default_factory=lambda: np.empty((2, 0), np.float32))
    # the lowest and the highest return-to-go at each timestep, in the environment's units; K = 0 without a discount

    @classmethod
    def fit(
        cls, data: TransitionDataset, spec: SpaceSpec, *, return_scale: float | None = None, discount: float = 1.0
    ) -> Normalizer:
        """Statistics of the observations; without `return_scale`, the largest |return-to-go| becomes 1."""
        if return_scale is None:
            largest = float(np.abs(data.to_go(discount)).max(initial=0.0))
            return_scale = 1 / largest if largest > 0 else 1.0
        units = cls.of(*mean_and_std(lambda: [data.observations]), spec, return_scale=return_scale)
        if discount == 1.0:
            return units
        shown = [(data.to_go(discount), data.timesteps)]
        bounds = bounds_by_timestep(shown, max_timesteps=int(data.lengths.max()))
        return replace(units, discount=discount, to_go_bounds=bounds)

    @classmethod
    def of(
        cls, mean: Float[ndarray, "S"], std: Float[ndarray, "S"], spec: SpaceSpec, *, return_scale: float
    ) -> Normalizer:
        """The units that these statistics make."""
        return cls(
            observation_mean=mean.astype(np.float32),
            observation_std=np.where(std > 1e-6, std, 1.0).astype(np.float32),  # a constant dimension stays as it is
            action_low=np.asarray(spec.action_low, np.float32),
            action_high=np.asarray(spec.action_high, np.float32),
            return_scale=return_scale,
        )

    def normalize(self, data: TransitionDataset) -> TransitionDataset:
        """The same episodes in the model's units; returns-to-go of the result are in them too."""
        return replace(
            data,
            observations=self.normalize_observations(data.observations),
            actions=self.normalize_actions(data.actions),
            rewards=data.rewards * np.float32(self.return_scale),
            returns_to_go=None if data.returns_to_go is None else data.returns_to_go * np.float32(self.return_scale),
            final_observations=None
            if data.final_observations is None
            else self.normalize_observations(data.final_observations),
        )

    def returns_while_acting(self, return_scale: float) -> ReturnRecursion:
        """How the returns-to-go that a policy is shown follow one another, times `return_scale`."""
        return ReturnRecursion(discount=self.discount, bounds=self.to_go_bounds * np.float64(return_scale))

    def normalize_observations(self, observations: Float[ndarray, "*B S"]) -> Float[ndarray, "*B S"]:
        return standardize(observations, self.observation_mean, self.observation_std).astype(np.float32)

    def normalize_actions(self, actions: Float[ndarray, "*B A"]) -> Float[ndarray, "*B A"]:
        return from_bounds(actions, self.action_low, self.action_high).astype(np.float32)

    def denormalize_actions(self, actions: Float[ndarray, "*B A"]) -> Float[ndarray, "*B A"]:
        """In the environment's units, within its bounds."""
        return to_bounds(actions, self.action_low, self.action_high).astype(np.float32)


# The formulas, for NumPy's arrays and torch's tensors alike: an exported policy computes with tensors.


def standardize(observations: Any, mean: Any, std: Any) -> Any:
    return (observations - mean) / std


def from_bounds(actions: Any, low: Any, high: Any) -> Any:
    """Actions between bounds, in [-1, 1]; a dimension with one value only becomes 0."""
    width = high - low
    varies = width > 0
    return ((actions - low) / (width + ~varies) * 2 - 1) * varies


def to_bounds(actions: Any, low: Any, high: Any) -> Any:
    """Actions in [-1, 1], between bounds and never beyond them."""
    return (low + (actions + 1) / 2 * (high - low)).clip(low, high)


def mean_and_std(
    parts: Callable[[], Iterable[Float[ndarray, "N S"]]],
) -> tuple[Float[ndarray, "S"], Float[ndarray, "S"]]:
    """Of all rows of all parts, which are asked for twice: the same, to the last bit, however the rows are parted."""
    _, mean = _mean(rows.astype(np.float64) for rows in parts())
    _, variance = _mean((rows - mean) ** 2 for rows in parts())
    return mean, np.sqrt(variance)


def _mean(parts: Iterable[Float[ndarray, "N S"]]) -> tuple[int, Float[ndarray, "S"]]:
    """How many rows there are, and their mean: row after row is added, in float64."""
    num, total = 0, np.empty((0, 0))
    for rows in parts:
        total = rows.sum(axis=0, keepdims=True) if not num else np.concatenate([total, rows]).sum(axis=0, keepdims=True)
        num += len(rows)
    return num, total[0] / num

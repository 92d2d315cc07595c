"""Held-out episodes that an evaluation replays, and linear cloning, the baseline that it is compared with.

Legend: N steps, S observation, A action dimension.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from dt_ray.data.normalizer import Normalizer
from dt_ray.data.transitions import TransitionDataset

RIDGE = 1e-3  # of the mean square of a normalised observation, which is 1
MAX_EPISODES, MAX_STEPS = 100, 20_000  # of an evaluation
MAX_EPISODE_STEPS = 2000  # of one episode: an action is computed for each, one after the other


@dataclass(frozen=True, kw_only=True)
class LinearCloning:
    """Actions as a linear function of the observation, and as a constant: least squares, in the model's units."""

    weights: Float[ndarray, "S+1 A"]  # the last row is the offset
    mean: Float[ndarray, "A"]

    @classmethod
    def fit(cls, parts: Iterable[TransitionDataset], normalizer: Normalizer) -> LinearCloning:
        """Ridge regression on the training episodes, gathered part by part."""
        squares: Any = 0.0
        products: Any = 0.0
        for part in parts:
            inputs, actions = _inputs(part, normalizer), normalizer.normalize_actions(part.actions).astype(np.float64)
            squares, products = squares + inputs.T @ inputs, products + inputs.T @ actions
        num: float = squares[-1, -1]
        penalty = RIDGE * num * np.eye(len(squares))
        penalty[-1, -1] = 0.0  # the offset is free
        weights = cast("ndarray", np.linalg.solve(squares + penalty, products))
        return cls(weights=weights, mean=products[-1] / num)

    def predict(self, data: TransitionDataset, normalizer: Normalizer) -> Float[ndarray, "N A"]:
        return np.clip(_inputs(data, normalizer) @ self.weights, -1.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class EpisodeStarts:
    """The first observation of each episode that a run knows, and what became of it."""

    observations: Float[ndarray, "E S"]
    returns: Float[ndarray, "E"]  # undiscounted sums of rewards
    asked: Float[ndarray, "E"]  # the target return that corresponds to them
    episode_ids: Int[ndarray, "E"]

    @classmethod
    def of(cls, data: TransitionDataset, *, discount: float = 1.0) -> EpisodeStarts:
        returns = data.episode_returns
        return cls(
            observations=data.observations[data.starts],
            returns=returns,
            asked=returns if discount == 1.0 else data.to_go(discount)[data.starts].astype(np.float64),
            episode_ids=np.asarray(data.episode_ids),
        )

    @classmethod
    def joined(cls, parts: Sequence[EpisodeStarts]) -> EpisodeStarts:
        names = ("observations", "returns", "asked", "episode_ids")
        return cls(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in names})

    def nearest(self, target_return: float, num: int) -> Int[ndarray, "K"]:
        """The places of the episodes that are nearest to a target return, the nearest first."""
        distances = np.abs(self.asked - min(target_return, self.asked.max()))
        return np.argsort(distances, kind="stable")[:num]


@dataclass(frozen=True, kw_only=True)
class HeldOutEpisodes:
    """The episodes that an evaluation without an environment replays: in the log's units, with returns-to-go."""

    episodes: TransitionDataset
    cloning: LinearCloning
    normalizer: Normalizer
    starts: EpisodeStarts  # of all episodes, those trained on too


def replayed_part(data: TransitionDataset, *, seed: int = 0) -> TransitionDataset:
    """As many random episodes as an evaluation has time for; long ones are cut after `MAX_EPISODE_STEPS` steps."""
    order = np.random.default_rng(seed).permutation(data.num_episodes)[:MAX_EPISODES]
    steps = np.minimum(data.lengths, MAX_EPISODE_STEPS)[order].cumsum()
    return first_steps(data.select(np.sort(order[: max(1, int(np.searchsorted(steps, MAX_STEPS, side="right")))])))


def first_steps(data: TransitionDataset) -> TransitionDataset:
    """The first `MAX_EPISODE_STEPS` of each episode; returns-to-go are those of the whole episodes."""
    assert data.returns_to_go is not None
    if data.lengths.max(initial=0) <= MAX_EPISODE_STEPS:
        return data
    parts = data.timesteps < MAX_EPISODE_STEPS
    lengths = np.minimum(data.lengths, MAX_EPISODE_STEPS)
    return TransitionDataset(
        observations=data.observations[parts],
        actions=data.actions[parts],
        rewards=data.rewards[parts],
        terminated=data.terminated[parts],
        truncated=data.truncated[parts],
        returns_to_go=data.returns_to_go[parts],
        starts=np.cumsum(lengths) - lengths,
        episode_ids=data.episode_ids,
    )


def _inputs(data: TransitionDataset, normalizer: Normalizer) -> Float[ndarray, "N S+1"]:
    normalized = normalizer.normalize_observations(data.observations).astype(np.float64)
    return np.concatenate([normalized, np.ones((len(normalized), 1))], axis=1)

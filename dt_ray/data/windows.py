"""Trajectory windows: up to `length` consecutive steps of one episode, padded on the right, with a mask.

Legend: N transitions, E episodes, B windows, T window length, S observation, A action dimension.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray

from dt_ray.data.returns import returns_to_go
from dt_ray.data.transitions import TransitionDataset


@dataclass(frozen=True, kw_only=True)
class Windows:
    """A batch of windows; every column is zero where `mask` is false.

    `previous_actions[:, t]` is the action before step t, the logged one also at the first step of a window that starts
    inside an episode, and zero at the first step of an episode.
    """

    observations: Float[ndarray, "B T S"]
    actions: Float[ndarray, "B T A"]
    previous_actions: Float[ndarray, "B T A"]
    returns_to_go: Float[ndarray, "B T"]
    timesteps: Int[ndarray, "B T"]
    mask: Bool[ndarray, "B T"]


def slice_windows(
    data: TransitionDataset, anchors: Int[ndarray, "B"], *, length: int, discount: float = 1.0
) -> Windows:
    """The windows that start at the transitions `anchors`, in the units of `data`.

    Raises:
        IndexError: an anchor is not a transition of `data`.
        ValueError: `length` < 1.
    """
    anchors = np.asarray(anchors, dtype=np.int64)
    if length < 1:
        raise ValueError(f"a window holds at least one step, got length={length}")
    if len(anchors) and (anchors.min() < 0 or anchors.max() >= data.num_transitions):
        raise IndexError(f"anchors must be in 0..{data.num_transitions - 1}, got {anchors.min()}..{anchors.max()}")
    episode = np.searchsorted(data.starts, anchors, side="right") - 1
    steps = anchors[:, None] + np.arange(length)  # [B, T]
    mask = steps < data.ends[episode][:, None]
    rows = np.where(mask, steps, anchors[:, None])  # padding re-reads the anchor, then is zeroed
    first = rows == data.starts[episode][:, None]
    to_go = returns_to_go(data.rewards, data.starts, discount=discount)
    return Windows(
        observations=data.observations[rows] * mask[..., None],
        actions=data.actions[rows] * mask[..., None],
        previous_actions=data.actions[rows - ~first] * (mask & ~first)[..., None],
        returns_to_go=to_go[rows] * mask,
        timesteps=(rows - data.starts[episode][:, None]) * mask,
        mask=mask,
    )


def sample_anchors(num_transitions: int, *, batch_size: int, seed: int, step: int) -> Int[ndarray, "B"]:
    """Uniform over all transitions; a function of (seed, step) alone, so that resuming needs no iterator state."""
    return np.random.default_rng([seed, step]).integers(num_transitions, size=batch_size)


@dataclass(frozen=True, kw_only=True)
class WindowTable:
    """A dataset laid out so that each window is one contiguous run of floats.

    A row is (observation, previous action, return-to-go, timestep, is a real step), and after each episode come
    `length` rows of padding. The window of T steps at a row is the T + 1 rows from there: the extra row holds, as its
    previous action, the action of step T. Padding is zero, but for that previous action in its first row.
    """

    rows: Float[ndarray, "R W"]
    starts: Int[ndarray, "E"]  # transition at which each episode starts, counted without padding
    num_transitions: int
    length: int  # longest window that can be cut
    observation_dim: int
    action_dim: int

    @classmethod
    def build(cls, data: TransitionDataset, *, length: int, discount: float = 1.0) -> WindowTable:
        """Lays out `data` for windows of up to `length` steps; timesteps are exact up to 2**24."""
        num_steps, num_episodes = data.num_transitions, data.num_episodes
        observation_dim, action_dim = data.observations.shape[1], data.actions.shape[1]
        table = np.zeros((num_steps + num_episodes * length, observation_dim + action_dim + 3), np.float32)
        rows = np.arange(num_steps) + length * np.repeat(np.arange(num_episodes), data.lengths)
        table[rows, :observation_dim] = data.observations
        table[rows + 1, observation_dim : observation_dim + action_dim] = data.actions
        table[rows, -3] = returns_to_go(data.rewards, data.starts, discount=discount)
        table[rows, -2] = data.timesteps
        table[rows, -1] = 1.0
        return cls(
            rows=table,
            starts=data.starts,
            num_transitions=num_steps,
            length=length,
            observation_dim=observation_dim,
            action_dim=action_dim,
        )

    def rows_of(self, anchors: Int[ndarray, "B"]) -> Int[ndarray, "B"]:
        """The row at which the window of each transition starts."""
        return anchors + self.length * (np.searchsorted(self.starts, anchors, side="right") - 1)

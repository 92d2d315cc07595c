"""Trajectory windows: up to `length` consecutive steps of one episode, padded on the right, with a mask.

Legend: N transitions, E episodes, B windows, T window length, S observation, A action dimension, U updates a draw.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray

from dt_ray.data.transitions import TransitionDataset

# How an episode ends in the log: cut, and nothing tells what came next; by the environment; cut, and what came next is
# known.
HIDDEN, TERMINATED, FOLLOWED = 0, 1, 2
UPDATES_A_DRAW = 64  # anchors are drawn for so many updates at a time: a generator costs as much as a batch


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
    to_go = data.to_go(discount)
    return Windows(
        observations=data.observations[rows] * mask[..., None],
        actions=data.actions[rows] * mask[..., None],
        previous_actions=data.actions[rows - ~first] * (mask & ~first)[..., None],
        returns_to_go=to_go[rows] * mask,
        timesteps=(rows - data.starts[episode][:, None]) * mask,
        mask=mask,
    )


def draw_anchors(num_transitions: int, *, batch_size: int, seed: int, draw: int) -> Int[ndarray, "U B"]:
    """Anchors of the `UPDATES_A_DRAW` updates from `draw * UPDATES_A_DRAW` on, uniform over all transitions.

    A function of (seed, draw) alone: resuming needs no iterator state.
    """
    return np.random.default_rng([seed, draw]).integers(num_transitions, size=(UPDATES_A_DRAW, batch_size))


def draw_mixed_anchors(
    sizes: Int[ndarray, "D"], shares: Sequence[float], *, batch_size: int, seed: int, draw: int
) -> Int[ndarray, "U B"]:
    """As `draw_anchors`, for datasets of these sizes one after the other: each with its share of the windows."""
    random = np.random.default_rng([seed, draw]).random((2, UPDATES_A_DRAW, batch_size))
    edges = np.cumsum(shares) / np.sum(shares)
    chosen = np.minimum(np.searchsorted(edges, random[0], side="right"), len(sizes) - 1)
    return (np.cumsum(sizes) - sizes)[chosen] + (random[1] * sizes[chosen]).astype(np.int64)


@dataclass(frozen=True, kw_only=True)
class WindowTable:
    """A dataset laid out so that each window is one contiguous run of floats, and nothing is held twice.

    A row is (observation, action, return-to-go). One row of zeros stands before each episode and `length` of them at
    the end; the first one behind an episode shows the observation after its last step, where that is known. The window
    of T steps at transition i of episode e is the T + 1 rows from i + e on: the extra row in front holds the action
    before its first step. Behind an episode's end a window reads on into the next one: its mask, which `bounds` tells,
    says where to stop.
    """

    rows: Float[ndarray, "R W"]
    bounds: Int[ndarray, "E+1"]  # transition at which each episode starts, and the number of them all
    endings: Int[ndarray, "E"]  # `HIDDEN`, `TERMINATED` or `FOLLOWED`
    first_timesteps: Int[ndarray, "E"] | None  # of pieces of episodes; None: all start at 0
    length: int  # longest window that can be cut
    observation_dim: int
    action_dim: int

    @property
    def num_transitions(self) -> int:
        return int(self.bounds[-1])

    @classmethod
    def build(cls, data: TransitionDataset, *, length: int, discount: float = 1.0) -> WindowTable:
        """Lays out `data` for windows of up to `length` steps."""
        num_steps, num_episodes = data.num_transitions, data.num_episodes
        observation_dim, action_dim = data.observations.shape[1], data.actions.shape[1]
        table = np.zeros((num_steps + num_episodes + length, observation_dim + action_dim + 1), np.float32)
        rows = np.arange(num_steps) + 1 + np.repeat(np.arange(num_episodes), data.lengths)
        table[rows, :observation_dim] = data.observations
        table[rows, observation_dim:-1] = data.actions
        table[rows, -1] = data.to_go(discount)
        endings = np.where(data.terminated[data.ends - 1], TERMINATED, HIDDEN)
        if data.final_observations is not None:
            is_known = np.isfinite(data.final_observations).all(axis=1)
            table[(rows[data.ends - 1] + 1)[is_known], :observation_dim] = data.final_observations[is_known]
            endings[is_known & (endings == HIDDEN)] = FOLLOWED
        return cls(
            rows=table,
            bounds=np.append(data.starts, num_steps).astype(np.int64),
            endings=endings,
            first_timesteps=data.first_timesteps,
            length=length,
            observation_dim=observation_dim,
            action_dim=action_dim,
        )

    def shortened(self, length: int) -> WindowTable:
        """The same rows, for windows of up to `length` steps."""
        assert length <= self.length, (length, self.length)
        return replace(self, length=length)

    def find(self, anchors: Int[ndarray, "*any"]) -> Int[ndarray, "4 *any"]:
        """For each transition the row in front of it, its timestep, the steps to its episode's end, and its ending."""
        next_ones = np.searchsorted(self.bounds, anchors, side="right")
        episodes = next_ones - 1
        timesteps = anchors - self.bounds[episodes]
        if self.first_timesteps is not None:
            timesteps += self.first_timesteps[episodes]
        return np.stack([anchors + episodes, timesteps, self.bounds[next_ones] - anchors, self.endings[episodes]])

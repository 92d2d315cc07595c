"""Trajectory windows: up to `length` consecutive steps of one episode, padded on the right, with a mask.

Training cuts them out of a `WindowTable` (`training/cutting.py`); `slice_windows` makes the same ones for others.

Legend: N transitions, E episodes, B windows, T window length, S observation, A action dimension, W floats of a row,
R rows, P parts, U updates a draw, G groups.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import repeat
from typing import Any, cast

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray

from dt_ray.data.returns import Tail, returns_to_go
from dt_ray.data.transitions import TransitionDataset

# How an episode ends in the log: cut, without the observation after its last step; ended by the environment; cut, with
# that observation.
HIDDEN, TERMINATED, FOLLOWED = 0, 1, 2
RETURN_BINS = 30  # that returns are told apart by where `data.balance` evens them out
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
    terminated: Bool[ndarray, "B"] | None = None  # the environment ended the window's episode
    final_observations: Float[ndarray, "B S"] | None = None  # after that episode's last step; NaN where not logged


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
        terminated=data.terminated[data.ends - 1][episode],
        final_observations=data.known_finals[episode],
    )


def draw_anchors(num_transitions: int, *, batch_size: int, seed: int, draw: int) -> Int[ndarray, "U B"]:
    """Anchors of the `UPDATES_A_DRAW` updates from `draw * UPDATES_A_DRAW` on, uniform over all transitions.

    A function of (seed, draw) alone: resuming needs no iterator state.
    """
    return np.random.default_rng([seed, draw]).integers(num_transitions, size=(UPDATES_A_DRAW, batch_size))


def draw_shared_anchors(
    sizes: Int[ndarray, "G"], shares: Sequence[float] | Float[ndarray, "G"], *, batch_size: int, seed: int, draw: int
) -> Int[ndarray, "U B"]:
    """As `draw_anchors`, for groups of so many transitions one after the other: each with its share of the windows."""
    return anchors_by_share(np.random.default_rng([seed, draw]), sizes, shares, (UPDATES_A_DRAW, batch_size))


def anchors_by_share(
    random: np.random.Generator,
    sizes: Int[ndarray, "G"],
    shares: Sequence[float] | Float[ndarray, "G"],
    shape: tuple[int, ...],
) -> Int[ndarray, "*shape"]:
    """Transitions of groups of these sizes: first a group by its share, then uniformly one of its transitions."""
    drawn = random.random((2, *shape))
    edges = cast("ndarray", np.cumsum(shares) / np.sum(shares))
    places = cast("ndarray", np.searchsorted(edges, drawn[0], side="right"))
    chosen = np.minimum(places, len(sizes) - 1)
    return (np.cumsum(sizes) - sizes)[chosen] + (drawn[1] * sizes[chosen]).astype(np.int64)


def balanced_shares(returns: Float[ndarray, "E"], lengths: Int[ndarray, "E"], *, balance: float) -> Float[ndarray, "E"]:
    """The share of all windows that each episode gets, where those of rare returns get more.

    The range of the returns is cut into `RETURN_BINS` parts. A part with n transitions gets windows in proportion to
    n^(1 - `balance`): as logged with 0, and with 1 as many as any other part that has an episode.
    """
    bins = np.histogram_bin_edges(returns, RETURN_BINS)
    places = np.clip(np.searchsorted(bins, returns, side="right") - 1, 0, RETURN_BINS - 1)
    transitions = np.bincount(places, weights=lengths, minlength=RETURN_BINS)
    weights = lengths * transitions[places] ** -balance
    return weights / weights.sum()


@dataclass(frozen=True, kw_only=True)
class WindowTable:
    """A dataset laid out so that each window is one contiguous run of floats, and nothing is held twice.

    A row is (observation, action, return-to-go), and of relabelled data the return-to-go of the rewards too. One row of
    zeros stands before each episode and `length` of them at the end; the first one behind an episode shows the
    observation after its last step, where that is known. The window of T steps at transition i of episode e is the
    T + 1 rows from i + e on: the extra row in front holds the action before its first step. Behind an episode's end a
    window reads on into the next one: its mask, which `bounds` tells, says where to stop.

    The rows may lie in several parts, each of whole episodes and with `length` rows of zeros at its own end.
    """

    parts: tuple[Float[ndarray, "_ W"], ...]
    part_episodes: Int[ndarray, "P"]  # the first one of each part
    bounds: Int[ndarray, "E+1"]  # transition at which each episode starts, and the number of them all
    endings: Int[ndarray, "E"]  # `HIDDEN`, `TERMINATED` or `FOLLOWED`
    first_timesteps: Int[ndarray, "E"] | None  # of pieces of episodes; None: all start at 0
    length: int  # longest window that can be cut
    observation_dim: int
    action_dim: int
    relabeled_with: float | None = None  # the discount, of relabelled data: see `relabeled_returns`

    @property
    def num_transitions(self) -> int:
        return int(self.bounds[-1])

    @property
    def width(self) -> int:
        """Floats of a row."""
        return self.observation_dim + self.action_dim + (1 if self.relabeled_with is None else 2)

    @property
    def part_rows(self) -> Int[ndarray, "P"]:
        """The row with which each part begins, where only the last part has rows of zeros at its end."""
        return self.bounds[self.part_episodes] + self.part_episodes

    @property
    def rows(self) -> Float[ndarray, "R W"]:
        """All rows: those of the one part, or a copy of those of all parts."""
        if len(self.parts) == 1:
            return self.parts[0]
        begins = self.part_rows
        rows = np.empty((begins[-1] + len(self.parts[-1]), self.width), np.float32)
        for begin, end, part in reversed(list(zip(begins, [*(begins[1:] + 1), len(rows)], self.parts, strict=True))):
            rows[begin:end] = part[: end - begin]  # and of the next part the row in front, behind the last episode here
        return rows

    @classmethod
    def build(
        cls,
        data: TransitionDataset | Sequence[TransitionDataset],
        *,
        length: int,
        discount: float = 1.0,
        is_relabeled: bool = False,
    ) -> WindowTable:
        """Lays out episodes, of one dataset or of several, for windows of up to `length` steps."""
        pieces = [data] if isinstance(data, TransitionDataset) else data
        lengths = np.concatenate([piece.lengths for piece in pieces])
        firsts = [piece.first_timesteps for piece in pieces]
        zeros = [np.zeros(piece.num_episodes, np.int64) for piece in pieces]
        dims, size = (pieces[0].observations.shape[1], pieces[0].actions.shape[1]), (int(lengths.sum()), len(lengths))
        return cls(
            parts=(write_part(pieces, *size, length=length, discount=discount, is_relabeled=is_relabeled),),
            part_episodes=np.zeros(1, np.int64),
            bounds=np.append(0, np.cumsum(lengths)),
            endings=np.concatenate([endings_of(piece) for piece in pieces]),
            first_timesteps=None
            if all(first is None for first in firsts)
            else np.concatenate([zero if first is None else first for first, zero in zip(firsts, zeros, strict=True)]),
            length=length,
            observation_dim=dims[0],
            action_dim=dims[1],
            relabeled_with=discount if is_relabeled else None,
        )

    @property
    def returns(self) -> Float[ndarray, "E"]:
        """The return-to-go at the first step of each episode, as it stands in the table."""
        column, num = self.observation_dim + self.action_dim, len(self.bounds) - 1
        firsts: list[int] = self.part_episodes.tolist()
        found: list[ndarray] = []
        for part, begin, end in zip(self.parts, firsts, [*firsts[1:], num], strict=True):
            rows = self.bounds[begin:end] - self.bounds[begin] + np.arange(end - begin)  # in front of each episode
            found.append(part[rows + 1, column])
        return np.concatenate(found)

    @property
    def lengths(self) -> Int[ndarray, "E"]:
        """The number of steps of each episode."""
        return np.diff(self.bounds)

    def balanced_shares(self, balance: float) -> Float[ndarray, "E"]:
        """The share of the windows that `data.balance` gives each episode."""
        return balanced_shares(self.returns, self.lengths, balance=balance)

    def shortened(self, length: int) -> WindowTable:
        """The same rows, for windows of up to `length` steps."""
        assert length <= self.length, (length, self.length)
        return replace(self, length=length)

    def find(self, anchors: Int[ndarray, "*any"]) -> Int[ndarray, "4 *any"]:
        """For each transition: the row before it, its timestep, the steps to its episode's end, and how that ends."""
        next_ones = np.searchsorted(self.bounds, anchors, side="right")
        episodes = next_ones - 1
        timesteps = anchors - self.bounds[episodes]
        if self.first_timesteps is not None:
            timesteps += self.first_timesteps[episodes]
        return np.stack([anchors + episodes, timesteps, self.bounds[next_ones] - anchors, self.endings[episodes]])


def write_part(
    pieces: Iterable[TransitionDataset],
    num_transitions: int,
    num_episodes: int,
    *,
    length: int,
    discount: float,
    tails: Iterable[Tail | None] | None = None,
    is_relabeled: bool = False,
) -> Float[ndarray, "_ W"]:
    """The rows of a part of a table, written piece by piece; `tails` has one for each piece, as in `returns_to_go`."""
    rows, begin = np.empty((0, 0), np.float32), 0
    for piece, tail in zip(pieces, repeat(None) if tails is None else tails, strict=False):
        observation_dim = piece.observations.shape[1]
        action_end = observation_dim + piece.actions.shape[1]
        if not rows.size:
            width = action_end + 1 + is_relabeled
            rows = np.zeros((num_transitions + num_episodes + length, width), np.float32)
        places = np.arange(piece.num_transitions) + np.repeat(begin + 1 + np.arange(piece.num_episodes), piece.lengths)
        rows[places, :observation_dim] = piece.observations
        rows[places, observation_dim:action_end] = piece.actions
        rows[places, action_end] = piece.to_go(discount, tail)
        if is_relabeled:
            rows[places, -1] = returns_to_go(piece.rewards, piece.starts, discount=discount)
        if piece.final_observations is not None:
            is_known = np.isfinite(piece.final_observations).all(axis=1)
            rows[(places[piece.ends - 1] + 1)[is_known], :observation_dim] = piece.final_observations[is_known]
        begin += piece.num_transitions + piece.num_episodes
    return rows


def relabeled_returns(newest: Any, earned: Any, earned_newest: Any, ahead: Any, *, discount: float) -> Any:
    """The return-to-go of a step in a window of relabelled data: the rewards up to the newest step, then its value.

    `newest` is the relabelled return-to-go of the window's newest step, `ahead` steps later; `earned` and
    `earned_newest` are those of the rewards at both steps. So R_t = r_t + discount * R_{t+1} holds inside a window, as
    it does while a policy acts (Yamagata et al. 2023). The formula for NumPy's arrays and torch's tensors alike.
    """
    weight = discount**ahead
    return (earned - weight * earned_newest) + weight * newest


def places_in_windows(
    data: TransitionDataset, *, length: int, discount: float
) -> Iterator[tuple[Int[ndarray, "R"], Float[ndarray, "R"]]]:
    """For 0, 1, …, `length` - 1: the transitions with so many steps after them in a window, and their returns-to-go.

    Together these are all returns-to-go that windows of relabelled data show.
    """
    earned, relabeled = returns_to_go(data.rewards, data.starts, discount=discount), data.to_go()
    rows, ends = np.arange(data.num_transitions), np.repeat(data.ends, data.lengths)
    for ahead in range(length):
        rows = rows[rows + ahead < ends[rows]]
        newest = rows + ahead
        yield rows, relabeled_returns(relabeled[newest], earned[rows], earned[newest], ahead, discount=discount)


def endings_of(data: TransitionDataset) -> Int[ndarray, "E"]:
    """How each episode ends: `HIDDEN`, `TERMINATED` or `FOLLOWED`."""
    terminated = data.terminated[data.ends - 1]
    return np.where(terminated, TERMINATED, np.where(data.are_ends_known, FOLLOWED, HIDDEN))

"""Features of each episode, by which it is later compared with the others: some numbers and a sample of its steps.

Each part of a log is read once, and the size of an episode's features does not grow with its length.

Legend: N transitions, E episodes, S observation dimension, A action dimension, C columns (S + A + 1: observations,
actions, reward), K sampled steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, cast

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray

from dt_ray.data.transitions import TransitionDataset

NUM_SAMPLED = 64  # steps of an episode
MAX_SAMPLED = 2**25  # numbers in the samples of all episodes, 128 MB; of more, every second sampled step is kept
TAKEN_BACK = 0.5  # share of a move that the next one must undo to make it a spike and no jump
MAX_STEPS = 2**18  # processed at once
FEWEST_SAMPLED = 6  # steps of an episode, however many episodes there are


@dataclass(frozen=True, kw_only=True)
class EpisodeFeatures:
    """Features of each episode; `*_step` is the step at which the largest run, spike, jump or bend begins."""

    episode_ids: Int[ndarray, "E"]
    lengths: Int[ndarray, "E"]
    returns: Float[ndarray, "E"]
    is_terminated: Bool[ndarray, "E"]
    digests: Int[ndarray, "E"]  # equal for episodes with the same rows
    mean: Float[ndarray, "E C"]
    spread: Float[ndarray, "E C"]  # standard deviation
    lowest: Float[ndarray, "E C"]
    highest: Float[ndarray, "E C"]
    run: Int[ndarray, "E C"]  # the most steps in a row with the same value
    run_step: Int[ndarray, "E C"]
    spike: Float[ndarray, "E C"]  # the largest move that the next step takes back
    spike_step: Int[ndarray, "E C"]
    jump: Float[ndarray, "E C"]  # the largest move from a step to the next
    jump_step: Int[ndarray, "E C"]
    usual_move: Float[ndarray, "E C"]  # its mean
    bend: Float[ndarray, "E C"]  # the largest change of that move
    bend_step: Int[ndarray, "E C"]
    num_repeats: Int[ndarray, "E"]  # rows that are copies of an earlier row of the episode
    repeat_step: Int[ndarray, "E"]
    at_limit: Float[ndarray, "E A"]  # share of the steps at the episode's own smallest or largest action
    rows: Float[ndarray, "E K C"]  # sampled steps, NaN past the last
    next_observations: Float[ndarray, "E K S"]

    @classmethod
    def of(cls, data: TransitionDataset, *, num_sampled: int = NUM_SAMPLED) -> EpisodeFeatures:
        columns = np.concatenate([data.observations, data.actions, data.rewards[:, None]], axis=1)
        starts, lengths = data.starts, data.lengths
        steps = np.arange(len(columns)) - np.repeat(starts, lengths)
        wide = columns.astype(np.float64)
        mean = np.add.reduceat(wide, starts) / lengths[:, None]
        spread = np.sqrt(np.add.reduceat((wide - np.repeat(mean, lengths, axis=0)) ** 2, starts) / lengths[:, None])
        lowest, highest = np.minimum.reduceat(columns, starts), np.maximum.reduceat(columns, starts)
        moves = np.diff(wide, axis=0, prepend=wide[:1])
        moves[starts] = 0
        following = np.append(moves[1:], np.zeros((1, wide.shape[1])), axis=0)
        smaller, larger = (pick(np.abs(moves), np.abs(following)) for pick in (np.minimum, np.maximum))
        taken_back = np.where((moves * following < 0) & (smaller >= TAKEN_BACK * larger), smaller, 0.0)
        bends = np.abs(moves - np.append(np.zeros((1, wide.shape[1])), moves[:-1], axis=0))
        bends[steps < 2] = 0
        runs = _runs(moves, steps)
        spike, spike_step = _largest(taken_back, starts, lengths, steps)
        jump, jump_step = _largest(np.abs(moves), starts, lengths, steps)
        bend, bend_step = _largest(bends, starts, lengths, steps)
        run, run_end = _largest(runs, starts, lengths, steps)
        hashes = _hashes(columns)
        num_repeats, repeat_step = _repeats(hashes, starts, lengths, steps)
        num_observations = data.observations.shape[1]
        actions = columns[:, num_observations:-1]
        low, high = (np.repeat(each[:, num_observations:-1], lengths, axis=0) for each in (lowest, highest))
        margin = 1e-3 * (high - low)
        at_limit = ((actions <= low + margin) | (actions >= high - margin)).astype(np.float64)
        rows, after = _sample(columns, starts, lengths, num_sampled)
        # Factors that differ from step to step, so that the sum depends on the order of the rows.
        mixed = hashes * (steps.astype(np.uint64) * np.uint64(2) + np.uint64(1))
        return cls(
            episode_ids=data.episode_ids,
            lengths=lengths,
            returns=data.episode_returns,
            is_terminated=data.terminated[data.ends - 1],
            digests=np.add.reduceat(mixed, starts).view(np.int64),
            mean=mean,
            spread=spread,
            lowest=lowest,
            highest=highest,
            run=run.astype(np.int64),
            run_step=run_end - run.astype(np.int64) + 1,
            spike=spike,
            spike_step=spike_step,
            jump=jump,
            jump_step=jump_step,
            usual_move=np.add.reduceat(np.abs(moves), starts) / np.maximum(lengths - 1, 1)[:, None],
            bend=bend,
            bend_step=bend_step,
            num_repeats=num_repeats,
            repeat_step=repeat_step,
            at_limit=np.add.reduceat(at_limit, starts) / lengths[:, None],
            rows=rows,
            next_observations=after[:, :, :num_observations],
        )

    @property
    def num_episodes(self) -> int:
        return len(self.lengths)

    @property
    def observation_dim(self) -> int:
        return self.next_observations.shape[2]

    @property
    def action_dim(self) -> int:
        return self.at_limit.shape[1]

    def select(self, episodes: Int[ndarray, "M"]) -> EpisodeFeatures:
        return EpisodeFeatures(**{each.name: getattr(self, each.name)[episodes] for each in fields(self)})

    def thinned(self) -> EpisodeFeatures:
        """With every second of the sampled steps."""
        return EpisodeFeatures(
            **{each.name: getattr(self, each.name) for each in fields(self)[:-2]},
            rows=self.rows[:, ::2].copy(),
            next_observations=self.next_observations[:, ::2].copy(),
        )


class FeatureCollector:
    """Gathers the features of a log part by part, in bounded memory."""

    def __init__(self) -> None:
        self._parts: list[EpisodeFeatures] = []
        self._num_sampled = NUM_SAMPLED

    def add(self, data: TransitionDataset) -> None:
        """Looks at these episodes, at `MAX_STEPS` steps at once or at one episode."""
        pieces: list[int] = np.unique(data.starts // MAX_STEPS, return_index=True)[1].tolist()
        for begin, end in zip(pieces, [*pieces[1:], data.num_episodes], strict=True):
            piece = data if len(pieces) == 1 else data.select(np.arange(begin, end))
            self._parts.append(EpisodeFeatures.of(piece, num_sampled=self._num_sampled))
        while self._num_sampled > FEWEST_SAMPLED and self._size() > MAX_SAMPLED:
            self._parts = [part.thinned() for part in self._parts]
            self._num_sampled = (self._num_sampled + 1) // 2

    def _size(self) -> int:
        return sum(part.rows.size + part.next_observations.size for part in self._parts)

    def joined(self) -> EpisodeFeatures:
        """Of all episodes, in the order of their ids."""
        return join_features(self._parts)


def join_features(parts: Sequence[EpisodeFeatures]) -> EpisodeFeatures:
    """The features of all episodes, in the order of their ids, whatever part they came in."""
    joined = EpisodeFeatures(
        **{each.name: np.concatenate([getattr(part, each.name) for part in parts]) for each in fields(EpisodeFeatures)}
    )
    return joined.select(np.argsort(joined.episode_ids, kind="stable"))


def _runs(moves: Float[ndarray, "N C"], steps: Int[ndarray, "N"]) -> Int[ndarray, "N C"]:
    """For each step and column, the number of steps in a row, up to this one, with the same value."""
    begins = (moves != 0) | (steps == 0)[:, None]
    at = np.arange(len(moves))[:, None]
    return at - np.maximum.accumulate(np.where(begins, at, 0), axis=0) + 1


def _largest(
    values: ndarray, starts: Int[ndarray, "E"], lengths: Int[ndarray, "E"], steps: Int[ndarray, "N"]
) -> tuple[ndarray, ndarray]:
    """The largest value of each episode and column, and the first step that has it."""
    largest = np.maximum.reduceat(values, starts)
    has_it = values == np.repeat(largest, lengths, axis=0)
    first = np.where(has_it, steps[:, None], np.iinfo(np.int64).max)
    return largest, np.minimum.reduceat(first, starts)


def _hashes(columns: Float[ndarray, "N C"]) -> Int[ndarray, "N"]:
    """A hash of each row: the sum of its bits times random odd numbers, modulo 2^64."""
    bits = np.ascontiguousarray(columns, np.float32).view(np.uint32).astype(np.uint64)
    drawn = cast("ndarray", np.random.default_rng(0).integers(1, 2**63, size=bits.shape[1], dtype=np.uint64))
    products: Any = bits * (drawn | np.uint64(1))
    mixed = products.sum(axis=1, dtype=np.uint64)
    return (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)


def _repeats(
    hashes: Int[ndarray, "N"], starts: ndarray, lengths: ndarray, steps: ndarray
) -> tuple[Int[ndarray, "E"], Int[ndarray, "E"]]:
    """For each episode, the number of rows that repeat an earlier one, and the step of the first of these."""
    episode = np.repeat(np.arange(len(starts)), lengths)
    order = np.lexsort((steps, hashes, episode))
    again = np.zeros(len(hashes), bool)
    again[order[1:]] = (np.diff(hashes[order].astype(np.int64)) == 0) & (np.diff(episode[order]) == 0)
    first = np.where(again, steps, np.iinfo(np.int64).max)
    return np.add.reduceat(again.astype(np.int64), starts), np.minimum.reduceat(first, starts)


def _sample(
    columns: Float[ndarray, "N C"], starts: ndarray, lengths: ndarray, num: int
) -> tuple[Float[ndarray, "E K C"], Float[ndarray, "E K C"]]:
    """Steps at equal distances, without the last step, and the rows after them; NaN past the end of short episodes."""
    kept = np.minimum(lengths - 1, num)
    place = np.arange(num)[None, :]
    offsets = place * (lengths - 1)[:, None] // np.maximum(kept, 1)[:, None]
    is_there = place < kept[:, None]
    at = np.where(is_there, starts[:, None] + offsets, 0)
    rows, after = columns[at], columns[np.minimum(at + 1, len(columns) - 1)]
    rows[~is_there] = np.nan
    after[~is_there] = np.nan
    return rows, after

"""Episodes of several datasets (blocks), taken in any order without joining the blocks.

Legend: N transitions, E episodes of all blocks, C chosen episodes, B blocks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Literal, cast

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Int
from numpy import ndarray

from dt_ray.data.transitions import STEP_FIELDS, TransitionDataset
from dt_ray.data.windows import endings_of

CHUNK_STEPS = 2**16  # of episodes that are taken at a time


class EpisodeBlocks:
    """The episodes of several datasets, numbered from 0; lengths, returns and ends are kept apart from the steps."""

    def __init__(self, blocks: Iterable[TransitionDataset]) -> None:
        self._blocks: list[TransitionDataset | None] = [block for block in blocks if block.num_episodes]
        known = [block for block in self._blocks if block is not None]
        self.observation_dim, self.action_dim = known[0].observations.shape[1], known[0].actions.shape[1]
        self.has_returns = known[0].returns_to_go is not None
        self.has_finals = any(block.final_observations is not None for block in known)
        self.episode_ids = np.concatenate([block.episode_ids for block in known])
        self.episode_returns = np.concatenate([block.episode_returns for block in known])
        self.lengths = np.concatenate([block.lengths for block in known])
        self.endings = np.concatenate([endings_of(block) for block in known])
        self._starts = np.concatenate([block.starts for block in known])  # in its block
        counts = [block.num_episodes for block in known]
        self.block_of = np.repeat(np.arange(len(known)), counts)
        self._places = np.concatenate([np.arange(count) for count in counts])  # among its block's episodes

    def __iter__(self) -> Iterator[TransitionDataset]:
        return (block for block in self._blocks if block is not None)

    @property
    def num_episodes(self) -> int:
        return len(self.lengths)

    def take(self, episodes: Int[ndarray, "C"]) -> TransitionDataset:
        """These episodes, in this order."""
        lengths = self.lengths[episodes]
        starts = np.cumsum(lengths) - lengths
        names = [*STEP_FIELDS, *(["returns_to_go"] if self.has_returns else [])]
        return TransitionDataset(
            **dict(zip(names, self.columns(names, episodes), strict=True)),
            starts=starts,
            episode_ids=self.episode_ids[episodes],
            final_observations=self._finals(episodes) if self.has_finals else None,
        )

    def take_rewards(self, episodes: Int[ndarray, "C"]) -> TransitionDataset:
        """These episodes with only rewards and returns-to-go; observations and actions have 0 dimensions."""
        names = ["rewards", *(["returns_to_go"] if self.has_returns else [])]
        lengths = self.lengths[episodes]
        nothing = np.zeros((int(lengths.sum()), 0), np.float32)
        return TransitionDataset(
            **dict(zip(names, self.columns(names, episodes), strict=True)),
            observations=nothing,
            actions=nothing,
            starts=np.cumsum(lengths) - lengths,
        )

    def with_return_source(self, source: Literal["column", "rewards"] | None) -> EpisodeBlocks:
        """The same blocks with their logged returns-to-go, or without them; None leaves them as they are.

        Raises:
            DataError: there are none.
        """
        return self if source is None else EpisodeBlocks([block.with_return_source(source) for block in self])

    def columns(self, names: Sequence[str], episodes: Int[ndarray, "C"]) -> list[ndarray]:
        """The steps of these episodes, in this order, of each of these columns."""
        lengths, owners = self.lengths[episodes], self.block_of[episodes]
        starts = np.cumsum(lengths) - lengths
        rows = cast("ndarray", np.arange(lengths.sum()) + np.repeat(self._starts[episodes] - starts, lengths))
        return [self._gather(name, rows, np.repeat(owners, lengths)) for name in names]

    def chunks(self, episodes: Int[ndarray, "C"]) -> list[Int[ndarray, "_"]]:
        """The same episodes, a few at a time: about `CHUNK_STEPS` steps, or one episode."""
        if not len(episodes):
            return []
        numbers = (np.cumsum(self.lengths[episodes]) - 1) // CHUNK_STEPS
        edges = [0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist(), len(episodes)]
        return [episodes[begin:end] for begin, end in pairwise(edges)]

    def renumbered(self, episodes: Int[ndarray, "C"]) -> tuple[Int[ndarray, "_"], Int[ndarray, "B"]]:
        """The blocks that hold these episodes, and how much smaller their episode numbers are without the others."""
        needed = np.unique(self.block_of[episodes])
        counts = np.bincount(self.block_of, minlength=len(self._blocks))
        left_out = counts.copy()
        left_out[needed] = 0
        return needed, np.cumsum(left_out) - left_out

    def consumed(self, chunks: Sequence[Int[ndarray, "_"]]) -> Iterator[TransitionDataset]:
        """The episodes of each chunk; the memory of a block is freed when no later chunk needs it."""
        last = np.zeros(len(self._blocks), np.int64)
        for number, episodes in enumerate(chunks):
            last[self.block_of[episodes]] = number
        for number, episodes in enumerate(chunks):
            yield self.take(episodes)
            if (done := np.flatnonzero(last == number)).size:
                for block in done:
                    self._blocks[block] = None
                pa.default_memory_pool().release_unused()

    def _gather(self, name: str, rows: Int[ndarray, "N"], owners: Int[ndarray, "N"]) -> ndarray:
        numbers: list[int] = np.unique(owners).tolist()
        first: ndarray = getattr(self._blocks[numbers[0]] if numbers else next(iter(self)), name)
        if len(numbers) <= 1:
            return first[rows]
        found = np.empty((len(rows), *first.shape[1:]), first.dtype)
        for block in numbers:
            here = owners == block
            found[here] = getattr(self._blocks[block], name)[rows[here]]
        return found

    def _finals(self, episodes: Int[ndarray, "C"]) -> Float[ndarray, "C S"]:
        found = np.full((len(episodes), self.observation_dim), np.nan, np.float32)
        numbers: list[int] = np.unique(self.block_of[episodes]).tolist()
        for number in numbers:
            block, here = self._blocks[number], self.block_of[episodes] == number
            if block is not None and block.final_observations is not None:
                found[here] = block.final_observations[self._places[episodes[here]]]
        return found

"""The source of batches for data in blocks of shuffled whole episodes, which Ray Data holds (`data.residency=dataset`).

Legend: K blocks, D datasets of a mix, U updates a draw.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Int
from numpy import ndarray

from dt_ray.config.schema import RunConfig
from dt_ray.data.held_out import HeldOutEpisodes
from dt_ray.data.logs.episodes import from_table
from dt_ray.data.normalizer import Normalizer
from dt_ray.data.spaces import SpaceSpec
from dt_ray.data.windows import UPDATES_A_DRAW, WindowTable
from dt_ray.errors import DataError
from dt_ray.models.batch import WindowBatch, join_batches
from dt_ray.models.state_values import StateValues
from dt_ray.training.pools import Pool, PooledSource, PoolPlan, WindowStream
from dt_ray.training.stream_facts import lay_out

ReadBlocks = Callable[[Sequence[int]], Sequence[pa.Table]]  # the tables of these blocks


@dataclass(frozen=True, kw_only=True)
class ShardedData:
    """What a run knows before it trains on blocks of episodes, which are in the model's units already."""

    spec: SpaceSpec
    normalizer: Normalizer
    lengths: Int[ndarray, "K"]  # transitions of each block; empty ones may be among them
    sources: Int[ndarray, "K"]  # the number of its dataset, where several are mixed
    validation: WindowTable | None
    values: StateValues | None  # learned values of states, in the model's units, for relabelled data
    num_skipped_files: int
    notes: tuple[str, ...] = ()  # what looks wrong with the data, though it can be trained on
    held_out: HeldOutEpisodes | None = None

    def blocks_of(self, source: int) -> Int[ndarray, "_"]:
        """The blocks of one of the datasets that have transitions."""
        return np.flatnonzero((self.sources == source) & (self.lengths > 0))

    def check(self, config: RunConfig) -> None:
        """Raises:
        DataError: a dataset of the run has fewer blocks than there are workers, so that one would have no windows.
        """
        for source, path in enumerate(config.data.paths):
            num = len(self.blocks_of(source))
            if num < max(1, config.scaling.max_workers):
                raise DataError(
                    f"{path} has {num} block(s) of episodes to train on for {config.scaling.max_workers} workers; use "
                    f"fewer workers, or set data.residency=resident"
                )


class ShardedSource(PooledSource):
    """Cuts windows out of pools of blocks. Batch k is a function of (seed, k, rank, number of workers).

    Each transition is an anchor once a pass. Of a mix, the windows of each dataset come from pools of its own, and
    passes over its own blocks; how many of a batch are its share, drawn anew for each batch.
    """

    def __init__(
        self,
        data: ShardedData,
        config: RunConfig,
        read: ReadBlocks,
        *,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
        workers_on_node: int = 1,
    ) -> None:
        super().__init__(data, config, rank=rank, world_size=world_size, device=device, workers_on_node=workers_on_node)
        self.read, self.values = read, data.values
        shares = np.array(list(config.data.mix.values()) or [1.0])
        self.shares = shares / shares.sum()
        self.streams: list[WindowStream] = []
        for source, share in enumerate(self.shares):
            blocks = data.blocks_of(source)
            plan = PoolPlan(
                blocks=blocks,
                lengths=data.lengths[blocks],
                capacity=max(1, int(self.capacity * share)),
                seed=(config.seed, source),
                rank=rank,
                world_size=world_size,
            )
            self.streams.append(WindowStream(plan, self._lay_out, self.make_cutter, balance=config.data.balance))
        self._draw, self._counts = -1, np.zeros((0, len(shares)), np.int64)
        self._before = np.zeros(len(shares), np.int64)  # windows of each dataset that earlier draws took

    def batch(self, step: int) -> WindowBatch:
        parts: list[WindowBatch] = []
        for stream, (begin, num) in zip(self.streams, self._places(step), strict=True):
            parts += stream.take(begin, num) if num else []
        return self.noise(join_batches(parts), step)

    def _places(self, step: int) -> list[tuple[int, int]]:
        """For each dataset, where its windows of a batch begin in its stream, and how many these are."""
        if len(self.streams) == 1:
            return [(step * self.num_windows, self.num_windows)]
        draw, within = divmod(step, UPDATES_A_DRAW)
        if draw != self._draw:
            past = range(self._draw, draw) if 0 <= self._draw < draw else range(draw)
            start = self._before if 0 <= self._draw < draw else np.zeros(len(self.shares), np.int64)
            self._before = sum((self._shared_windows(each).sum(axis=0) for each in past), start)
            self._draw, self._counts = draw, self._shared_windows(draw)
        begins = self._before + self._counts[:within].sum(axis=0)
        return list(zip(begins.tolist(), self._counts[within].tolist(), strict=True))

    def _shared_windows(self, draw: int) -> Int[ndarray, "U D"]:
        """How many windows of this worker's share each dataset gives, for the updates of a draw."""
        random = np.random.default_rng([self.config.seed, draw, self.rank])
        return random.multinomial(self.num_windows, self.shares, size=UPDATES_A_DRAW)

    def _lay_out(self, pool: Pool) -> WindowTable:
        tables = self.read(pool.blocks.tolist())
        return lay_out([from_table(table, source="a block of episodes") for table in tables], self.config)

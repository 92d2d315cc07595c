"""The source of batches for data that does not fit into memory: episodes stream through pools of bounded size.

A pool is as many training episodes as a share of `data.memory_mb` holds, laid out like resident data. Each of its
transitions is the anchor of one window, in random order, while the next pool is being read. A pass over the data uses
every transition once, except for an incomplete batch at the end of each pool. With `data.balance` as many
windows are drawn, by the shares of the pool's episodes.

Which episodes a pool holds follows from their lengths, which are known before anything is read. So a run that goes on
begins with the pool of its next update, and draws what it would have drawn without the interruption.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count, islice
from typing import NamedTuple

import numpy as np
import torch

from dt_ray.config.schema import RunConfig
from dt_ray.data.logs.files import DatasetFile
from dt_ray.data.transitions import TransitionDataset
from dt_ray.data.windows import UPDATES_A_DRAW, WindowTable
from dt_ray.errors import DataError
from dt_ray.models.batch import WindowBatch
from dt_ray.models.state_values import StateValues
from dt_ray.training.cutting import WindowCutter, WindowLocations
from dt_ray.training.file_facts import read_chosen
from dt_ray.training.pools import PooledSource, anchors_of_pool
from dt_ray.training.stream_facts import StreamingData, cut_long, in_units, lay_out, lengths_cut_long


class Piece(NamedTuple):
    """One of the parts into which `cut_long` splits the training episodes of a file."""

    file: int  # of `StreamingData.files`
    number: int
    num_transitions: int


class Pool(NamedTuple):
    first_step: int  # the update of its first batch
    num_batches: int
    pieces: Sequence[Piece]


class StreamingSource(PooledSource):
    """Cuts windows out of one pool after the other: the batch of update k is a function of (seed, k), `data.memory_mb`
    and this worker's place among the others."""

    def __init__(
        self,
        data: StreamingData,
        config: RunConfig,
        *,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
        workers_on_node: int = 1,
    ) -> None:
        super().__init__(data, config, rank=rank, world_size=world_size, device=device, workers_on_node=workers_on_node)
        self.data = data
        self.values: StateValues | None = None  # relabelling needs all data at once
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="reader")
        self._pools: Iterator[tuple[Pool, WindowTable]] | None = None
        self._next: Future[tuple[Pool, WindowTable]] | None = None
        self._pieces: Iterator[TransitionDataset] = iter(())  # of the file that is being read
        self._next_piece = (-1, 0)  # the file, and the number of its piece that comes next
        self._pool: WindowCutter | None = None
        self._anchors, self._used = np.empty((0, 0), np.int64), 0  # of the pool's batches, and how many were taken
        self._locations: WindowLocations | None = None  # of the batches that come next

    def batch(self, step: int) -> WindowBatch:
        if self._used == len(self._anchors):
            self._take_pool(step)
        assert self._pool is not None
        draw, number = divmod(self._used, UPDATES_A_DRAW)
        if number == 0 or self._locations is None:
            self._locations = self._pool.find(self._anchors[draw * UPDATES_A_DRAW :][:UPDATES_A_DRAW])
        assert self._locations is not None
        self._used += 1
        return self.noise(self._pool.cut(self._locations, number), step)

    def _take_pool(self, step: int) -> None:
        if self._pools is None:
            self._pools = self._read_pools(step)
            self._next = self._reader.submit(next, self._pools)
        assert self._next is not None
        self._pool = self._locations = None  # its memory is needed
        pool, table = self._next.result()
        self._next = self._reader.submit(next, self._pools)
        self._pool = self.make_cutter(table)
        random = np.random.default_rng([self.config.seed, pool.first_step, self.rank])
        anchors = anchors_of_pool(table, random, balance=self.config.data.balance)
        anchors = anchors[: pool.num_batches * self.num_windows].reshape(pool.num_batches, -1)
        self._anchors, self._used = anchors, step - pool.first_step

    def _read_pools(self, step: int) -> Iterator[tuple[Pool, WindowTable]]:
        """Pools without end, from the one with the batch of update `step` on."""
        for pool in self._plan_pools():
            if pool.first_step + pool.num_batches > step:
                yield pool, lay_out(list(self._read(pool.pieces)), self.config)

    def _plan_pools(self) -> Iterator[Pool]:
        """Pools without end: pass after pass, each in another order."""
        gathered: list[Piece] = []
        size = step = 0
        for number in count():
            pieces = list(self._plan_pass(number))
            for at, piece in enumerate(pieces, start=1):
                gathered.append(piece)
                size += piece.num_transitions
                if size >= self.capacity or (at == len(pieces) and size >= self.num_windows):
                    pool = Pool(step, size // self.num_windows, gathered)
                    yield pool
                    step += pool.num_batches
                    gathered, size = [], 0

    def _plan_pass(self, number: int) -> Iterator[Piece]:
        """This worker's training episodes, from files that no other worker reads in this pass."""
        order = np.random.default_rng([self.config.seed, number]).permutation(len(self.data.files))
        for file in order[self.rank :: self.world_size].tolist():
            sizes = lengths_cut_long(self.data.train_lengths[file], self.capacity)
            yield from (Piece(file, at, size) for at, size in enumerate(sizes))

    def _read(self, pieces: Sequence[Piece]) -> Iterator[TransitionDataset]:
        """Pieces in the model's units; a file is read once for pieces of it that follow one another.

        Raises:
            DataError: a file has changed since the run began.
        """
        for file, number, num_transitions in pieces:
            if self._next_piece != (file, number):
                self._pieces = iter(())  # the file before is held no longer
                self._pieces = islice(self._pieces_of(self.data.files[file]), number, None)
            self._next_piece = (file, number + 1)
            piece = next(self._pieces, None)
            if piece is None or piece.num_transitions != num_transitions:
                raise DataError(
                    f"{self.data.files[file].path} has other episodes than when the run began; once it is written, "
                    f"resume the run: --resume {self.config.name}"
                )
            yield piece

    def _pieces_of(self, file: DatasetFile) -> Iterator[TransitionDataset]:
        data = read_chosen(file, self.data.train_ids, self.config, self.spec)
        return cut_long(in_units(data, self.config, self.normalizer), self.capacity)

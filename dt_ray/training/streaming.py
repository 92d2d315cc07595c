"""The source of batches for data that does not fit into memory: episodes stream through pools of bounded size.

A pool is as many training episodes as a share of `data.memory_mb` holds, laid out like resident data. Each of its
transitions is the anchor of one window, in random order, while the next pool is being read. A pass over the data uses
every transition once, except for an incomplete batch at the end of each pool. With `data.balance` as many
windows are drawn, by the shares of the pool's episodes.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count

import numpy as np
import torch

from dt_ray.config.schema import RunConfig
from dt_ray.data.transitions import TransitionDataset
from dt_ray.data.windows import UPDATES_A_DRAW, WindowTable, anchors_by_share
from dt_ray.models.batch import WindowBatch
from dt_ray.models.state_values import StateValues
from dt_ray.training.cutting import WindowCutter, WindowLocations
from dt_ray.training.resident import ReturnNoise
from dt_ray.training.stream_facts import StreamingData, capacity_of, cut_long, in_units, lay_out, read_chosen

POOL_SHARE = 1 / 6  # of a node's memory, for the pools of all its workers: one in use, one being read and laid out


class StreamingSource:
    """Cuts windows out of one pool after the other; a resumed run begins a new pass over the data."""

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
        self.spec, self.normalizer, self.num_skipped_files = data.spec, data.normalizer, data.num_skipped_files
        self.held_out = data.held_out
        self.values: StateValues | None = None  # relabelling needs all data at once
        self.data, self.config, self.device = data, config, device
        self.rank, self.world_size = rank, world_size
        self.noise = ReturnNoise(config, data.normalizer, rank=rank, world_size=world_size)
        self.num_windows = self.noise.share.stop - self.noise.share.start
        self.capacity = capacity_of(config, data.spec, share=POOL_SHARE / workers_on_node)
        self.validation = None if data.validation is None else self._cutter(data.validation)
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="reader")
        self._pools: Iterator[WindowTable] | None = None
        self._next: Future[WindowTable] | None = None
        self._pool: WindowCutter | None = None
        self._anchors, self._used = np.empty((0, 0), np.int64), 0  # of the pool's batches, and how many were taken
        self._locations: WindowLocations | None = None  # of the batches that come next

    def batch(self, step: int) -> WindowBatch:
        if self._used == len(self._anchors):
            self._take_pool(step)
        assert self._pool is not None
        draw, number = divmod(self._used, UPDATES_A_DRAW)
        if number == 0:
            self._locations = self._pool.find(self._anchors[draw * UPDATES_A_DRAW :][:UPDATES_A_DRAW])
        assert self._locations is not None
        self._used += 1
        return self.noise(self._pool.cut(self._locations, number), step)

    def validation_batch(self, index: int) -> WindowBatch | None:
        return None if self.validation is None else self.validation.batch(index)

    def _take_pool(self, step: int) -> None:
        if self._pools is None:
            self._pools = self._read_pools(step)
            self._next = self._reader.submit(next, self._pools)
        assert self._next is not None
        self._pool = None  # its memory is needed
        table = self._next.result()
        self._next = self._reader.submit(next, self._pools)
        self._pool = self._cutter(table)
        random = np.random.default_rng([self.config.seed, step, self.rank])
        if balance := self.config.data.balance:  # a pool is a sample of the files: its returns stand for all
            shares = table.balanced_shares(balance)
            anchors = anchors_by_share(random, table.lengths, shares, (table.num_transitions,))
        else:
            anchors = random.permutation(table.num_transitions)
        num_batches = len(anchors) // self.num_windows
        self._anchors, self._used = anchors[: num_batches * self.num_windows].reshape(num_batches, -1), 0

    def _read_pools(self, first_step: int) -> Iterator[WindowTable]:
        """Pools without end: pass after pass, each in another order."""
        gathered: list[TransitionDataset] = []
        size = 0
        for number in count(first_step):  # a run that goes on must not see again what it has just seen
            for piece in self._read_pass(number):
                gathered.append(piece)
                size += piece.num_transitions
                if size >= self.capacity:
                    yield lay_out(gathered, self.config)
                    gathered, size = [], 0
            if size >= self.num_windows:
                yield lay_out(gathered, self.config)
                gathered, size = [], 0

    def _read_pass(self, number: int) -> Iterator[TransitionDataset]:
        """This worker's training episodes, from files that no other worker reads in this pass."""
        order = np.random.default_rng([self.config.seed, number]).permutation(len(self.data.files))
        for index in order[self.rank :: self.world_size]:
            file = self.data.files[index]
            for piece in read_chosen([file], self.data.train_ids, self.config, self.spec):
                yield from cut_long(in_units(piece, self.config, self.normalizer), self.capacity)

    def _cutter(self, table: WindowTable) -> WindowCutter:
        share = self.noise.share
        return WindowCutter(table, self.device, seed=0, batch_size=self.config.optim.batch_size, share=share)

"""Streams of windows out of pools of whole episodes; a stream can be entered at any of its windows.

A block is some whole episodes that are read together. A pass goes through all blocks, in an order that is a function of
(seed, pass), of which each worker takes every n-th. Blocks that follow one another make a pool, laid out like resident
data. Each transition of a pool is the anchor of one window, in random order; then comes the next pool, without end.

Legend: K blocks, M blocks of a pool, N transitions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Int
from numpy import ndarray

from dt_ray.config.schema import RunConfig
from dt_ray.data.held_out import HeldOutEpisodes
from dt_ray.data.normalizer import Normalizer
from dt_ray.data.spaces import SpaceSpec
from dt_ray.data.windows import UPDATES_A_DRAW, WindowTable, anchors_by_share
from dt_ray.models.batch import WindowBatch
from dt_ray.training.cutting import WindowCutter, WindowLocations
from dt_ray.training.resident import ReturnNoise
from dt_ray.training.stream_facts import capacity_of

POOL_SHARE = 1 / 6  # of a node's memory, for the pools of all its workers: one in use, one being read and laid out


@dataclass(frozen=True)
class Pool:
    """Blocks whose episodes are in memory together."""

    blocks: Int[ndarray, "M"]
    begin: int  # the windows of the stream before it
    seed: tuple[int, ...]  # of the order of its windows


@dataclass(frozen=True, kw_only=True)
class PoolPlan:
    """Which blocks make a worker's pools, pass after pass: known without reading any."""

    blocks: Int[ndarray, "K"]
    lengths: Int[ndarray, "K"]  # the transitions of each, at least one
    capacity: int  # transitions of a pool, if no block has more
    seed: tuple[int, ...]
    rank: int = 0
    world_size: int = 1

    def pools(self, window: int = 0) -> Iterator[Pool]:
        """The pools from the one with this window of the stream on, without end."""
        begin = 0
        for number in count():
            order = np.random.default_rng([*self.seed, number]).permutation(len(self.blocks))
            order = order[self.rank :: self.world_size]
            size = int(self.lengths[order].sum())
            if begin + size > window:
                ends = np.cumsum(self.lengths[order])
                # Pools of about the same size; a block lies where its middle does.
                num = -(-size // self.capacity)
                places = (2 * ends - self.lengths[order]) * num // (2 * size)
                for place in np.unique(places):
                    mine = places == place
                    pool_begin = begin + int(ends[mine][0] - self.lengths[order][mine][0])
                    if begin + int(ends[mine][-1]) > window:
                        yield Pool(self.blocks[order[mine]], pool_begin, (*self.seed, number, int(place), self.rank))
            begin += size


class PooledData(Protocol):
    """What a run knows before it trains on pools of its data."""

    @property
    def spec(self) -> SpaceSpec: ...
    @property
    def normalizer(self) -> Normalizer: ...
    @property
    def validation(self) -> WindowTable | None: ...
    @property
    def num_skipped_files(self) -> int: ...
    @property
    def held_out(self) -> HeldOutEpisodes | None: ...


class PooledSource:
    """What the sources of windows out of pools have in common; a pool holds up to `capacity` transitions."""

    def __init__(
        self,
        data: PooledData,
        config: RunConfig,
        *,
        rank: int,
        world_size: int,
        device: torch.device | str,
        workers_on_node: int,
    ) -> None:
        self.spec, self.normalizer, self.num_skipped_files = data.spec, data.normalizer, data.num_skipped_files
        self.held_out = data.held_out
        self.config, self.device = config, device
        self.rank, self.world_size = rank, world_size
        self.noise = ReturnNoise(config, data.normalizer, rank=rank, world_size=world_size)
        self.num_windows = self.noise.share.stop - self.noise.share.start
        self.capacity = capacity_of(config, data.spec, share=POOL_SHARE / workers_on_node)
        self.validation = None if data.validation is None else self.make_cutter(data.validation)

    def validation_batch(self, index: int) -> WindowBatch | None:
        return None if self.validation is None else self.validation.batch(index)

    def make_cutter(self, table: WindowTable) -> WindowCutter:
        share = self.noise.share
        return WindowCutter(table, self.device, seed=0, batch_size=self.config.optim.batch_size, share=share)


def anchors_of_pool(table: WindowTable, random: np.random.Generator, *, balance: float) -> Int[ndarray, "N"]:
    """Each transition of a pool once, in random order; with a balance as many, by the shares of its episodes."""
    if not balance:
        return random.permutation(table.num_transitions)
    shares = table.balanced_shares(balance)  # a pool is a sample of the episodes: its returns stand for all
    return anchors_by_share(random, table.lengths, shares, (table.num_transitions,))


class WindowStream:
    """The windows of one pool after the other, of which the next is laid out meanwhile."""

    def __init__(
        self,
        plan: PoolPlan,
        lay_out: Callable[[Pool], WindowTable],
        make_cutter: Callable[[WindowTable], WindowCutter],
        *,
        balance: float = 0.0,
    ) -> None:
        self.plan, self.lay_out, self.make_cutter, self.balance = plan, lay_out, make_cutter, balance
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="pools")
        self._pools = plan.pools()
        self._next: Future[tuple[Pool, WindowTable]] | None = None
        self._cutter: WindowCutter | None = None
        self._anchors, self._used = np.empty(0, np.int64), 0  # of the pool, and how many were taken
        self._window = -1  # of the stream, that comes next
        self._found: WindowLocations | None = None
        self._found_begin = self._found_end = 0  # which of the anchors were found

    def take(self, window: int, num: int) -> list[WindowBatch]:
        """`num` windows of the stream from this one on, in a part for each pool that they lie in."""
        if window != self._window:
            self._enter(window)
        parts: list[WindowBatch] = []
        missing = num
        while missing:
            if self._used == len(self._anchors):
                self._take_pool()
            part = self._cut(missing, ahead=UPDATES_A_DRAW * num)
            parts.append(part)
            missing -= len(part.mask)
        self._window = window + num
        return parts

    def _cut(self, most: int, *, ahead: int) -> WindowBatch:
        """The next windows of the pool, at most so many; they are found for as many as `ahead` says at a time."""
        assert self._cutter is not None
        if self._used == self._found_end:
            self._found_begin, self._found_end = self._used, min(self._used + ahead, len(self._anchors))
            self._found = self._cutter.find(self._anchors[None, self._found_begin : self._found_end])
        assert self._found is not None
        begin = self._used - self._found_begin
        self._used = min(self._used + most, self._found_end)
        chosen = slice(begin, self._used - self._found_begin)
        found = self._found._make(None if each is None else each[:, chosen] for each in self._found)
        return self._cutter.cut(found, 0)

    def _enter(self, window: int) -> None:
        """Goes to a window of the stream: the first one, or the one with which a resumed run goes on."""
        if self._next is not None:
            self._next.cancel()
        self._pools, self._anchors, self._used = self.plan.pools(window), np.empty(0, np.int64), 0
        self._next = self._reader.submit(self._lay_out_next, self._pools)
        self._take_pool(window)

    def _take_pool(self, window: int | None = None) -> None:
        assert self._next is not None
        self._cutter = self._found = None  # their memory is needed
        pool, table = self._next.result()
        self._next = self._reader.submit(self._lay_out_next, self._pools)
        self._cutter = self.make_cutter(table)
        self._anchors = anchors_of_pool(table, np.random.default_rng(pool.seed), balance=self.balance)
        self._used = self._found_begin = self._found_end = 0 if window is None else window - pool.begin

    def _lay_out_next(self, pools: Iterator[Pool]) -> tuple[Pool, WindowTable]:
        pool = next(pools)
        return pool, self.lay_out(pool)

"""Prepares the data and the batches of a run: resident where the data fits into memory, else streaming."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import pyarrow as pa
import torch

from dt_ray.config.schema import RunConfig
from dt_ray.data.blocks import EpisodeBlocks
from dt_ray.data.formats import is_flat
from dt_ray.data.held_out import HeldOutEpisodes
from dt_ray.data.logs.datasets import ReadEpisodes
from dt_ray.data.logs.files import DatasetFile
from dt_ray.data.logs.reading import read_blocks
from dt_ray.data.logs.sizes import decoded_size
from dt_ray.data.spaces import SpaceSpec
from dt_ray.errors import DataError
from dt_ray.training.file_facts import FileFacts
from dt_ray.training.layout import plan_layout
from dt_ray.training.resident import BatchSource, ResidentData, ResidentSource
from dt_ray.training.sharded import ReadBlocks, ShardedData, ShardedSource
from dt_ray.training.stream_facts import StreamingData
from dt_ray.training.streaming import StreamingSource

Residency = Literal["resident", "streaming", "dataset"]

log = logging.getLogger("dt_ray")


def prepare_here(config: RunConfig, spec: SpaceSpec, read: ReadEpisodes | None = None) -> ResidentData | StreamingData:
    """The data of a run, laid out in this process; what was `read` before is not read again where it fits.

    Raises:
        DataError: the dataset can't be read or trained on; the file, the episode and the step are named.
    """
    with _memory_of_the_system():
        known = read if read is not None and read.suits(config.data, spec) else None
        facts = FileFacts(config, spec)
        files, num_skipped = known.sound_files if known is not None else facts.sound_files()
        if residency_of(files, config) == "streaming":
            if known is not None:
                known.let_go()
            return StreamingData.build(files, facts, num_skipped_files=num_skipped)
        blocks = known.take() if known is not None else read_blocks(config.data, spec, files)
        return ResidentData.build(blocks, spec, config, num_skipped_files=num_skipped)


def read_held_out_here(config: RunConfig, spec: SpaceSpec) -> HeldOutEpisodes | None:
    """The held-out episodes of a run, without writing the tables that `prepare_here` writes.

    Raises:
        DataError: as `prepare_here`.
    """
    with _memory_of_the_system():
        facts = FileFacts(config, spec)
        files, num_skipped = facts.sound_files()
        if residency_of(files, config) == "streaming":
            return StreamingData.build(files, facts, num_skipped_files=num_skipped).held_out
        return plan_layout(EpisodeBlocks(read_blocks(config.data, spec, files)), spec, config)[0].held_out


@contextmanager
def _memory_of_the_system() -> Iterator[None]:
    """Makes Arrow allocate from the C library; its own pool keeps half of the memory that is freed between files."""
    usual = pa.default_memory_pool()
    pa.set_memory_pool(pa.system_memory_pool())
    try:
        yield
    finally:
        pa.set_memory_pool(usual)


def residency_of(files: Sequence[DatasetFile], config: RunConfig) -> Residency:
    """Where the data is held, by `data.residency` and its size in memory; logs the reason.

    Raises:
        DataError: it should be streamed, but an episode's rows may lie in several files.
    """
    path, settings = ", ".join(config.data.paths), config.data
    size = decoded_size(files, settings)
    residency = residency_by_size(size, config)
    log.info(
        "data: %.0f MB in memory, from %d file(s), %s (data.residency=%s, data.memory_mb=%d)",
        *(size / 2**20, len(files), residency, settings.residency, settings.memory_mb),
    )
    if residency == "streaming" and is_flat(files[0], settings):
        raise DataError(
            f"{path} has a row per step; streaming reads whole episodes: pack it once with "
            f"`python -m dt_ray.data import {path} --out DIR`, or set data.residency=resident, or dataset on Ray"
        )
    return residency


def residency_by_size(num_bytes: int, config: RunConfig) -> Residency:
    """`data.residency`, or what `auto` means for data that takes so many bytes in memory."""
    settings = config.data
    if settings.residency != "auto":
        return settings.residency
    is_large = num_bytes > settings.memory_mb * 2**20 and not settings.mix and not config.relabels
    return "resident" if not is_large else "dataset" if settings.is_function else "streaming"


def make_source(
    data: ResidentData | StreamingData | ShardedData,
    config: RunConfig,
    *,
    read: ReadBlocks | None = None,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str = "cpu",
    workers_on_node: int = 1,
) -> BatchSource:
    """One worker's batches; `workers_on_node` share the memory that `data.memory_mb` allows.

    Of data in blocks `read` has the blocks.
    """
    place = {"rank": rank, "world_size": world_size, "device": device}
    if isinstance(data, ResidentData):
        return ResidentSource(data, config, **place)
    if isinstance(data, ShardedData):
        assert read is not None, "data in blocks comes with a function that reads them"
        return ShardedSource(data, config, read, **place, workers_on_node=workers_on_node)
    return StreamingSource(data, config, **place, workers_on_node=workers_on_node)

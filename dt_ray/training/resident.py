"""Sources of batches: the interface, and the source for data that fits into memory."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Int
from numpy import ndarray

from dt_ray.config.schema import RunConfig
from dt_ray.data.blocks import EpisodeBlocks
from dt_ray.data.held_out import HeldOutEpisodes
from dt_ray.data.normalizer import Normalizer
from dt_ray.data.spaces import SpaceSpec
from dt_ray.data.transitions import TransitionDataset
from dt_ray.data.windows import WindowTable, draw_shared_anchors
from dt_ray.learners import window_length_of
from dt_ray.models.batch import WindowBatch
from dt_ray.models.state_values import StateValues
from dt_ray.training.cutting import DrawAnchors, WindowCutter
from dt_ray.training.layout import Layout, plan_layout


class BatchSource(Protocol):
    """Batches of windows in the model's units, for one worker of several."""

    spec: SpaceSpec
    normalizer: Normalizer
    values: StateValues | None  # learned values of states, in the model's units, for relabelled data
    num_skipped_files: int  # left out by `data.on_corrupt=skip`
    held_out: HeldOutEpisodes | None  # replayed by evaluations where there is no environment

    def batch(self, step: int) -> WindowBatch:
        """This worker's share of the global batch of update `step`."""
        ...

    def validation_batch(self, index: int) -> WindowBatch | None:
        """Windows of held-out episodes, the same ones every time; None where no episode is held out."""
        ...


@dataclass(frozen=True, kw_only=True)
class ResidentData:
    """A dataset in the model's units, laid out for windows once and shared by all workers of a node."""

    spec: SpaceSpec
    normalizer: Normalizer
    train: WindowTable
    validation: WindowTable | None
    values: StateValues | None
    sizes: Int[ndarray, "D"]  # transitions of each dataset in `train`
    num_skipped_files: int
    notes: tuple[str, ...] = ()  # what looks wrong with the data, though it can be trained on
    held_out: HeldOutEpisodes | None = None

    @classmethod
    def build(
        cls,
        data: TransitionDataset | Iterable[TransitionDataset],
        spec: SpaceSpec,
        config: RunConfig,
        *,
        num_skipped_files: int = 0,
    ) -> ResidentData:
        """Lays out the episodes of one or several datasets, and frees each dataset as soon as it is laid out.

        Raises:
            DataError: too few episodes to hold any out, or longer ones than the model's timestep table.
        """
        blocks = EpisodeBlocks([data] if isinstance(data, TransitionDataset) else data)
        del data
        layout, blocks = plan_layout(blocks, spec, config)
        validation = layout.write(blocks, layout.validation) if len(layout.validation) else None
        train = layout.write(blocks, layout.train, last_use=True)
        return cls.of(layout, train, validation, num_skipped_files=num_skipped_files)

    @classmethod
    def of(
        cls, layout: Layout, train: WindowTable, validation: WindowTable | None, *, num_skipped_files: int
    ) -> ResidentData:
        """The data whose tables have been written."""
        return cls(
            spec=layout.spec,
            normalizer=layout.normalizer,
            train=train,
            validation=validation,
            values=layout.values,
            sizes=layout.sizes,
            num_skipped_files=num_skipped_files,
            notes=layout.notes,
            held_out=layout.held_out,
        )


class ReturnNoise:
    """One worker's share of the errors that `data.return_noise` adds to the returns-to-go of a batch."""

    def __init__(self, config: RunConfig, normalizer: Normalizer, *, rank: int, world_size: int) -> None:
        self.seed, self.batch_size = config.seed, config.optim.batch_size
        self.scale, self.discount = config.data.return_noise * normalizer.return_scale, config.data.discount
        self.share = slice(rank * self.batch_size // world_size, (rank + 1) * self.batch_size // world_size)

    def __call__(self, batch: WindowBatch, step: int) -> WindowBatch:
        if self.scale == 0.0:
            return batch
        # One error for all steps of a window, multiplied by the discount for each step before its newest place, so that
        # the differences of its returns-to-go stay its rewards.
        errors = np.random.default_rng([self.seed, step, 1]).normal(scale=self.scale, size=self.batch_size)
        ahead = np.arange(batch.mask.shape[1])[::-1]
        errors = errors[self.share, None] * self.discount**ahead
        blurred = batch.returns_to_go + torch.from_numpy(errors).to(batch.returns_to_go)
        return replace(batch, returns_to_go=blurred)


class ResidentSource:
    """Cuts windows out of resident data: the batch of update k is a function of (seed, k), sliced by rank."""

    def __init__(
        self,
        data: ResidentData,
        config: RunConfig,
        *,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        self.spec, self.normalizer, self.values = data.spec, data.normalizer, data.values
        self.held_out = data.held_out
        self.num_skipped_files = data.num_skipped_files
        self.batch_size = config.optim.batch_size
        self.noise = ReturnNoise(config, data.normalizer, rank=rank, world_size=world_size)
        length = window_length_of(config)
        train, validation = data.train.shortened(length), data.validation
        draw = None
        if shares := tuple(config.data.mix.values()):
            draw = partial(draw_shared_anchors, data.sizes, shares)
        elif config.data.balance:
            draw = partial(draw_shared_anchors, train.lengths, train.balanced_shares(config.data.balance))
        self.train = self._cutter(train, device, seed=config.seed, draw=draw)
        self.validation = None
        if validation is not None:
            self.validation = self._cutter(validation.shortened(length), device, seed=0)

    def batch(self, step: int) -> WindowBatch:
        return self.noise(self.train.batch(step), step)

    def validation_batch(self, index: int) -> WindowBatch | None:
        return None if self.validation is None else self.validation.batch(index)

    def _cutter(
        self, table: WindowTable, device: torch.device | str, *, seed: int, draw: DrawAnchors | None = None
    ) -> WindowCutter:
        return WindowCutter(table, device, seed=seed, batch_size=self.batch_size, share=self.noise.share, draw=draw)

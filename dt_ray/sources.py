"""Where the loop's batches come from."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Int
from numpy import ndarray

from dt_ray.config import RunConfig
from dt_ray.data.normalizer import Normalizer
from dt_ray.data.spaces import SpaceSpec
from dt_ray.data.transitions import TransitionDataset
from dt_ray.data.windows import WindowTable, sample_anchors
from dt_ray.errors import DataError
from dt_ray.models.batch import WindowBatch


class BatchSource(Protocol):
    """Batches of windows in the model's units, for one worker of several."""

    spec: SpaceSpec
    normalizer: Normalizer

    def batch(self, step: int) -> WindowBatch:
        """This worker's share of the global batch of update `step`."""
        ...

    def validation_batch(self, index: int) -> WindowBatch | None:
        """Windows of held-out episodes, the same ones every time; None where no episode is held out."""
        ...


@dataclass(frozen=True, kw_only=True)
class ResidentData:
    """A dataset in the model's units, laid out for windows: made once and shared by all workers of a node."""

    spec: SpaceSpec
    normalizer: Normalizer
    train: WindowTable
    validation: WindowTable | None

    @classmethod
    def build(cls, data: TransitionDataset, spec: SpaceSpec, config: RunConfig) -> ResidentData:
        """Splits, fits the statistics on the training episodes and lays both parts out.

        Raises:
            DataError: too few episodes to hold any out, or longer ones than the model's timestep table.
        """
        train, validation, normalizer = split_and_fit(data, spec, config)

        def lay_out(part: TransitionDataset) -> WindowTable:
            normalized = normalizer.normalize(part)
            return WindowTable.build(normalized, length=config.window_length, discount=config.data.discount)

        return cls(
            spec=spec,
            normalizer=normalizer,
            train=lay_out(train),
            validation=lay_out(validation) if validation.num_episodes else None,
        )


def split_and_fit(
    data: TransitionDataset, spec: SpaceSpec, config: RunConfig
) -> tuple[TransitionDataset, TransitionDataset, Normalizer]:
    """The training and the held-out episodes, and the units fitted on the training episodes.

    Raises:
        DataError: too few episodes to hold any out, or longer ones than the model's timestep table.
    """
    settings = config.data
    check_lengths(data, config)
    if (np.diff(data.episode_ids) < 0).any():  # the split must not depend on the order in which files were read
        data = data.select(np.argsort(data.episode_ids, kind="stable"))
    train, validation = data.split(settings.validation_fraction, seed=config.seed)
    normalizer = Normalizer.fit(train, spec, return_scale=settings.return_scale, discount=settings.discount)
    return train, validation, normalizer


def check_lengths(data: TransitionDataset, config: RunConfig) -> None:
    """Raises:
    DataError: an episode has more steps than the model's timestep table has rows.
    """
    longest = int(data.lengths.argmax())
    if (length := int(data.lengths[longest])) > config.model.max_timesteps:
        raise DataError(
            f"{config.data.path}, episode {data.episode_ids[longest]} has {length} steps but the timestep table has "
            f"model.max_timesteps={config.model.max_timesteps} rows; set model.max_timesteps={length}"
        )


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
        self.spec, self.normalizer = data.spec, data.normalizer
        self.seed, self.batch_size = config.seed, config.optim.batch_size
        self.return_noise = config.data.return_noise * data.normalizer.return_scale
        self.share = slice(rank * self.batch_size // world_size, (rank + 1) * self.batch_size // world_size)
        self.train = WindowCutter(data.train, device)
        self.validation = None if data.validation is None else WindowCutter(data.validation, device)

    def batch(self, step: int) -> WindowBatch:
        batch = self.train.cut(seed=self.seed, step=step, batch_size=self.batch_size, share=self.share)
        if self.return_noise == 0.0:
            return batch
        # One error for all steps of a window: the differences between its returns-to-go are its rewards, and stay so.
        errors = np.random.default_rng([self.seed, step, 1]).normal(scale=self.return_noise, size=self.batch_size)
        blurred = batch.returns_to_go + torch.from_numpy(errors[self.share, None]).to(batch.returns_to_go)
        return replace(batch, returns_to_go=blurred)

    def validation_batch(self, index: int) -> WindowBatch | None:
        if self.validation is None:
            return None
        return self.validation.cut(seed=0, step=index, batch_size=self.batch_size, share=self.share)


class WindowCutter:
    """Windows of a table as views of one gathered block, on the device that holds the table."""

    def __init__(self, table: WindowTable, device: torch.device | str) -> None:
        self.table, self.device = table, device
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            rows = torch.from_numpy(table.rows).to(device)  # on the CPU: shared memory, only ever read
        num_rows, width = rows.shape
        self.blocks = rows.as_strided((num_rows - table.length, (table.length + 1) * width), (width, 1))
        self.offsets = torch.arange(table.length, device=device)

    def cut(self, *, seed: int, step: int, batch_size: int, share: slice) -> WindowBatch:
        anchors = sample_anchors(self.table.num_transitions, batch_size=batch_size, seed=seed, step=step)
        return self.at(anchors[share])

    def at(self, anchors: Int[ndarray, "B"]) -> WindowBatch:
        """The windows that start at these transitions; what stands at their padding is no zero but other steps."""
        table = self.table
        rows, timesteps, remaining = torch.from_numpy(table.find(anchors)).to(self.device)
        block = self.blocks.index_select(0, rows).view(len(anchors), table.length + 1, -1)
        mask = self.offsets < remaining[:, None]
        actions = block[:, :, table.observation_dim : -1]
        return WindowBatch(
            observations=block[:, 1:, : table.observation_dim],
            actions=actions[:, 1:],
            previous_actions=actions[:, :-1],
            returns_to_go=block[:, 1:, -1],
            timesteps=(timesteps[:, None] + self.offsets) * mask,
            mask=mask,
        )

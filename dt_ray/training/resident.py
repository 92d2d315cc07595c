"""Where the loop's batches come from."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple, Protocol

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from torch import Tensor

from dt_ray.config.schema import RunConfig
from dt_ray.data.held_out import HeldOutEpisodes, LinearCloning, replayed_part
from dt_ray.data.normalizer import Normalizer
from dt_ray.data.ranges import Ranges, find_range_traps
from dt_ray.data.row_traps import find_other_returns
from dt_ray.data.spaces import SpaceSpec, with_data_bounds
from dt_ray.data.transitions import TransitionDataset, chosen_episodes, join_episodes
from dt_ray.data.windows import FOLLOWED, TERMINATED, UPDATES_A_DRAW, WindowTable, draw_anchors, draw_mixed_anchors
from dt_ray.errors import DataError
from dt_ray.models.batch import WindowBatch
from dt_ray.models.state_values import StateValues
from dt_ray.training.relabeling import LearnedValues


class BatchSource(Protocol):
    """Batches of windows in the model's units, for one worker of several."""

    spec: SpaceSpec
    normalizer: Normalizer
    values: StateValues | None  # that returns are counted from, in the model's units
    num_skipped_files: int  # that `data.on_corrupt=skip` left out
    held_out: HeldOutEpisodes | None  # that evaluations replay where there is no environment

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
    values: StateValues | None
    sizes: Int[ndarray, "D"]  # transitions of each dataset in `train`
    num_skipped_files: int
    notes: tuple[str, ...] = ()  # what looks wrong with the data, though it can be trained on
    held_out: HeldOutEpisodes | None = None

    @classmethod
    def build(
        cls, data: TransitionDataset, spec: SpaceSpec, config: RunConfig, *, num_skipped_files: int = 0
    ) -> ResidentData:
        """Splits, fits the statistics on the training episodes and lays both parts out.

        Raises:
            DataError: too few episodes to hold any out, or longer ones than the model's timestep table.
        """
        ranges = Ranges.of(data)
        spec = with_data_bounds(spec, config.data.action_bounds, *ranges.actions)
        train, validation, normalizer, values = split_and_fit(data, spec, config)
        num_known = train.num_transitions - train.num_episodes + int(train.are_ends_known.sum())
        notes = find_notes(ranges, spec, config, num_known=num_known, num_transitions=train.num_transitions)
        if config.algorithm == "decision_transformer" and config.data.return_source is None:
            notes += tuple(find_other_returns(data, discount=config.data.discount))
        mix = config.data.mix  # without one, episode ids may be anything
        sizes = train.source_sizes(len(mix)) if mix else np.array([train.num_transitions])
        for path, size in zip(mix, sizes, strict=False):
            if size == 0:
                raise DataError(f"no episode of {path} is left to train on, and data.mix gives it a share")

        def lay_out(part: TransitionDataset) -> WindowTable:
            normalized = normalizer.normalize(part)
            return WindowTable.build(normalized, length=config.window_length, discount=config.data.discount)

        return cls(
            spec=spec,
            normalizer=normalizer,
            train=lay_out(train),
            validation=lay_out(validation) if validation.num_episodes else None,
            values=values,
            sizes=sizes,
            num_skipped_files=num_skipped_files,
            notes=notes,
            held_out=hold_out([validation], [train], normalizer, config),
        )


def hold_out(
    held_out: Sequence[TransitionDataset], train: Iterable[TransitionDataset], normalizer: Normalizer, config: RunConfig
) -> HeldOutEpisodes | None:
    """What evaluations replay: some held-out episodes, where there are any and there is no environment to play in."""
    held_out = [part for part in held_out if part.num_episodes]
    if config.env_id is not None or not held_out:
        return None
    episodes = join_episodes([replace(part, returns_to_go=part.to_go(config.data.discount)) for part in held_out])
    cloning = LinearCloning.fit(train, normalizer)
    return HeldOutEpisodes(episodes=replayed_part(episodes), cloning=cloning, normalizer=normalizer)


def find_notes(
    ranges: Ranges, spec: SpaceSpec, config: RunConfig, *, num_known: int, num_transitions: int
) -> tuple[str, ...]:
    """What a run should say of its data before it trains: a line each.

    `num_known` of the transitions to train on have a successor in the log, or none because the environment ended there.

    Raises:
        DataError: nothing would be trained.
    """
    notes = list(find_range_traps(ranges, spec, config.data.columns))
    if config.algorithm == "iql" and num_known < num_transitions:
        hidden = (
            f"iql learns values from a step and what came next, and of {num_transitions - num_known} of "
            f"{num_transitions} steps the log does not say what came next: they are last in their episodes, which the "
            f"environment did not end"
        )
        way_out = "name the column of it with data.columns.next_observation=NAME"
        if num_known == 0:
            raise DataError(f"{', '.join(config.data.paths)} trains nothing: {hidden}; {way_out}")
        if num_known < num_transitions / 2:
            notes.append(f"{hidden}; {way_out}")
    return tuple(notes)


def split_and_fit(
    data: TransitionDataset, spec: SpaceSpec, config: RunConfig
) -> tuple[TransitionDataset, TransitionDataset, Normalizer, StateValues | None]:
    """The training and the held-out episodes, the units fitted on the training episodes, and the values in them.

    Values are there under `data.return_source=value`, whose `data.values` is a checkpoint.

    Raises:
        DataError: too few episodes to hold any out, or longer ones than the model's timestep table.
        RunError: `data.values` is no complete checkpoint.
    """
    settings = config.data
    check_lengths(data, config)
    chosen = chosen_episodes(
        data.episode_ids,
        data.episode_returns,
        max_episodes=settings.max_episodes,
        top_fraction=settings.top_fraction,
    )
    if len(chosen) < data.num_episodes or (np.diff(chosen) < 0).any():  # in their order, whatever that of the files was
        data = data.select(chosen)
    learned = None
    if config.relabels:
        assert settings.values is not None
        learned = LearnedValues(settings.values)
        data = learned.relabel(data)
    else:
        data = data.with_return_source(config.return_source)
    train, validation = data.split(settings.validation_fraction, seed=config.seed)
    normalizer = Normalizer.fit(train, spec, return_scale=settings.return_scale, discount=settings.discount)
    return train, validation, normalizer, learned and learned.inside(normalizer, train)


def check_lengths(data: TransitionDataset, config: RunConfig) -> None:
    """Raises:
    DataError: an episode has more steps than the model's timestep table has rows.
    """
    longest = int(data.lengths.argmax())
    check_length(int(data.episode_ids[longest]), int(data.lengths[longest]), config)


def check_length(episode_id: int, length: int, config: RunConfig) -> None:
    """Raises:
    DataError: an episode of this length has more steps than the model's timestep table has rows.
    """
    if length > config.model.max_timesteps and not config.model.clamp_timesteps:
        raise DataError(
            f"{', '.join(config.data.paths)}, episode {episode_id} has {length} steps but the timestep table has "
            f"model.max_timesteps={config.model.max_timesteps} rows; set model.max_timesteps={length}, or "
            f"model.clamp_timesteps=true, which takes all later steps for the last one"
        )


MOST_COUNTED = 4096  # windows of a batch in whose steps each worker counts the real ones: more take longer than asking


class ReturnNoise:
    """One worker's share of the errors that `data.return_noise` adds to the returns-to-go of a batch."""

    def __init__(self, config: RunConfig, normalizer: Normalizer, *, rank: int, world_size: int) -> None:
        self.seed, self.batch_size = config.seed, config.optim.batch_size
        self.scale = config.data.return_noise * normalizer.return_scale
        self.share = slice(rank * self.batch_size // world_size, (rank + 1) * self.batch_size // world_size)

    def __call__(self, batch: WindowBatch, step: int) -> WindowBatch:
        if self.scale == 0.0:
            return batch
        # One error for all steps of a window: the differences between its returns-to-go are its rewards, and stay so.
        errors = np.random.default_rng([self.seed, step, 1]).normal(scale=self.scale, size=self.batch_size)
        blurred = batch.returns_to_go + torch.from_numpy(errors[self.share, None]).to(batch.returns_to_go)
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
        shares = tuple(config.data.mix.values())
        mixed = partial(draw_mixed_anchors, data.sizes, shares) if shares else None
        train, validation = data.train.shortened(config.window_length), data.validation
        self.train = self._cutter(train, device, seed=config.seed, draw=mixed)
        self.validation = None
        if validation is not None:
            self.validation = self._cutter(validation.shortened(config.window_length), device, seed=0)

    def batch(self, step: int) -> WindowBatch:
        return self.noise(self.train.batch(step), step)

    def validation_batch(self, index: int) -> WindowBatch | None:
        return None if self.validation is None else self.validation.batch(index)

    def _cutter(
        self, table: WindowTable, device: torch.device | str, *, seed: int, draw: DrawAnchors | None = None
    ) -> WindowCutter:
        return WindowCutter(table, device, seed=seed, batch_size=self.batch_size, share=self.noise.share, draw=draw)


class DrawAnchors(Protocol):
    """The anchors of the updates from `draw * UPDATES_A_DRAW` on, a function of (seed, draw)."""

    def __call__(self, *, batch_size: int, seed: int, draw: int) -> Int[ndarray, "U B"]: ...


class Places(NamedTuple):
    """Where the windows of several batches are in a table."""

    rows: Int[Tensor, "U B"]  # in front of the anchors
    timesteps: Int[Tensor, "U B T"]
    mask: Bool[Tensor, "U B T"]
    terminated: Bool[Tensor, "U B"]
    followed: Bool[Tensor, "U B"]
    num_real: Float[Tensor, "U"] | None  # real steps, of all workers' windows together


class WindowCutter:
    """Windows of a table as views of one gathered block, on the device that holds the table."""

    def __init__(
        self,
        table: WindowTable,
        device: torch.device | str,
        *,
        seed: int,
        batch_size: int,
        share: slice,
        draw: DrawAnchors | None = None,
    ) -> None:
        self.table, self.device = table, device
        self.draw_anchors = draw or partial(draw_anchors, table.num_transitions)
        self.seed, self.batch_size, self.share = seed, batch_size, share
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            rows = torch.from_numpy(table.rows).to(device)  # on the CPU: shared memory, only ever read
        num_rows, width = rows.shape
        self.blocks = rows.as_strided((num_rows - table.length, (table.length + 1) * width), (width, 1))
        self.offsets = torch.arange(table.length, device=device)
        self._draw, self._places = -1, self.find(np.empty((0, 0), np.int64))

    def batch(self, step: int) -> WindowBatch:
        """This worker's share of batch `step`, a function of (seed, step)."""
        draw, within = divmod(step, UPDATES_A_DRAW)
        if draw != self._draw:
            anchors = self.draw_anchors(batch_size=self.batch_size, seed=self.seed, draw=draw)
            is_large = self.batch_size > MOST_COUNTED
            found = self.find(anchors[:, self.share]) if is_large else self.find(anchors, share=self.share)
            self._draw, self._places = draw, found
        return self.cut(self._places, within)

    def find(self, anchors: Int[ndarray, "U G"], *, share: slice | None = None) -> Places:
        """What `cut` needs to know of the windows of several batches: of a share of each, if these are all workers'."""
        places, num_real = self.table.find(anchors), None
        if share is not None:  # every worker draws them all, and need not ask the others how many steps theirs have
            real = np.minimum(places[2], self.table.length).sum(axis=-1)
            num_real = torch.from_numpy(real.astype(np.float32)).to(self.device)
            places = places[:, :, share]
        found = torch.from_numpy(np.ascontiguousarray(places)).to(self.device).unsqueeze(-1)
        rows, timesteps, remaining, endings = found.unbind()
        mask = self.offsets < remaining
        return Places(
            rows=rows.squeeze(-1),
            timesteps=(timesteps + self.offsets).mul_(mask),
            mask=mask,
            terminated=endings.squeeze(-1) == TERMINATED,
            followed=endings.squeeze(-1) == FOLLOWED,
            num_real=num_real,
        )

    def cut(self, places: Places, number: int) -> WindowBatch:
        """The windows of one batch of several; what stands at their padding is no zero but other steps."""
        table = self.table
        block = self.blocks.index_select(0, places.rows[number]).unflatten(1, (table.length + 1, -1))
        actions = block[:, :, table.observation_dim : -1]
        return WindowBatch(
            observations=block[:, 1:, : table.observation_dim],
            actions=actions[:, 1:],
            previous_actions=actions[:, :-1],
            returns_to_go=block[:, 1:, -1],
            timesteps=places.timesteps[number],
            mask=places.mask[number],
            terminated=places.terminated[number],
            followed=places.followed[number],
            num_real=None if places.num_real is None else places.num_real[number],
        )

"""Decides, before a dataset's tables are written, which episodes are trained on and in which units.

Nothing here holds all of the data's steps at once: they are taken from their blocks a few episodes at a time.

Legend: E episodes of all blocks, T of them to train on, H held out, C chunks of episodes, D datasets of a mix.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import reduce

import numpy as np
from jaxtyping import Int
from numpy import ndarray

from dt_ray.config.schema import RunConfig
from dt_ray.data.blocks import EpisodeBlocks
from dt_ray.data.held_out import EpisodeStarts, HeldOutEpisodes, LinearCloning, replayed_part
from dt_ray.data.normalizer import Normalizer, mean_and_std
from dt_ray.data.ranges import Ranges, range_traps
from dt_ray.data.returns import Tail, bounds_by_timestep, find_tails
from dt_ray.data.row_traps import return_traps
from dt_ray.data.spaces import SpaceSpec, with_data_bounds
from dt_ray.data.transitions import (
    SOURCE_BITS,
    TransitionDataset,
    chosen_episodes,
    held_out_episodes,
    join_episodes,
)
from dt_ray.data.windows import HIDDEN, WindowTable, places_in_windows, write_part
from dt_ray.errors import DataError
from dt_ray.learners import declaration_of, return_source_of, window_length_of
from dt_ray.models.state_values import StateValues
from dt_ray.training.relabeling import LearnedValues

MAX_LOOKED_AT = 2**20  # first steps of a log that logged returns-to-go are compared with rewards in


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Which episodes of several blocks are laid out, in which order and units."""

    spec: SpaceSpec
    normalizer: Normalizer
    values: StateValues | None  # learned values of states, in the model's units, for relabelled data
    train: Int[ndarray, "T"]
    validation: Int[ndarray, "H"]
    sizes: Int[ndarray, "D"]  # transitions of each dataset in `train`
    notes: tuple[str, ...]  # what looks wrong with the data, though it can be trained on
    takes_logged_returns: bool  # returns-to-go are the logged ones; otherwise they are summed from the rewards
    discount: float
    length: int  # of windows
    held_out: HeldOutEpisodes | None = None  # what evaluations replay

    def write(self, blocks: EpisodeBlocks, episodes: Int[ndarray, "_"], *, last_use: bool = False) -> WindowTable:
        """The table of these episodes, in one part; after its `last_use` the blocks are empty."""
        chunks, tails = self.chunks(blocks, episodes)
        rows = self.write_chunks(blocks, chunks, tails, last_use=last_use)
        return self.table(blocks, episodes, (rows,), np.zeros(1, np.int64))

    def chunks(self, blocks: EpisodeBlocks, episodes: Int[ndarray, "_"]) -> tuple[list[ndarray], list[Tail | None]]:
        """The episodes in chunks, each with the tail of its rewards in the model's units (see `returns_to_go`)."""
        chunks = blocks.chunks(episodes)
        scale = np.float32(self.normalizer.return_scale)
        return chunks, _find_tails(blocks, chunks, scale, discount=self.discount)

    def write_chunks(
        self,
        blocks: EpisodeBlocks,
        chunks: Sequence[Int[ndarray, "_"]],
        tails: Sequence[Tail | None],
        *,
        last_use: bool = False,
    ) -> ndarray:
        """The rows of a part of a table that holds these chunks."""
        taken = blocks.consumed(chunks) if last_use else map(blocks.take, chunks)
        return write_part(
            map(self.normalizer.normalize, taken),
            sum(int(blocks.lengths[chunk].sum()) for chunk in chunks),
            sum(map(len, chunks)),
            length=self.length,
            discount=self.discount,
            tails=tails,
            is_relabeled=self.values is not None,
        )

    def table(
        self,
        blocks: EpisodeBlocks,
        episodes: Int[ndarray, "_"],
        parts: tuple[ndarray, ...],
        part_episodes: Int[ndarray, "P"],
    ) -> WindowTable:
        """The table of these episodes, whose rows lie in `parts`."""
        return WindowTable(
            parts=parts,
            part_episodes=part_episodes,
            bounds=np.append(0, np.cumsum(blocks.lengths[episodes])),
            endings=blocks.endings[episodes],
            first_timesteps=None,
            length=self.length,
            observation_dim=blocks.observation_dim,
            action_dim=blocks.action_dim,
            relabeled_with=None if self.values is None else self.discount,
        )


def plan_layout(blocks: EpisodeBlocks, spec: SpaceSpec, config: RunConfig) -> tuple[Layout, EpisodeBlocks]:
    """Splits the episodes and fits the units on those to train on; returns the layout and the blocks to take them from.

    These blocks are new ones where learned values replace the returns-to-go, else the given ones.

    Raises:
        DataError: too few episodes to hold any out, or longer ones than the model's timestep table.
        RunError: `data.values` is no complete checkpoint.
    """
    settings, declared = config.data, declaration_of(config)
    longest = int(blocks.lengths.argmax())
    check_length(int(blocks.episode_ids[longest]), int(blocks.lengths[longest]), config)
    ranges = reduce(Ranges.joined, map(Ranges.of, blocks))
    spec = with_data_bounds(spec, settings.action_bounds, *ranges.actions)
    notes: tuple[str, ...] = ()
    if declared.returns == "shown" and settings.return_source is None and blocks.has_returns:
        looked_at = int(np.searchsorted(np.cumsum(blocks.lengths), MAX_LOOKED_AT)) + 1
        first = blocks.take(np.arange(min(looked_at, blocks.num_episodes)))
        notes = tuple(return_traps(first, discount=settings.discount))
    chosen = chosen_episodes(
        blocks.episode_ids,
        blocks.episode_returns,
        max_episodes=settings.max_episodes,
        top_fraction=settings.top_fraction,
    )
    learned = None
    if config.relabels:
        assert settings.values is not None
        learned = LearnedValues(settings.values)
        blocks = EpisodeBlocks([learned.relabel(blocks.take(chosen), discount=settings.discount)])
        chosen = np.arange(blocks.num_episodes)
    else:
        blocks = blocks.with_return_source(return_source_of(config))
    held_out = held_out_episodes(len(chosen), settings.validation_fraction, seed=config.seed)
    train, validation = np.delete(chosen, held_out), chosen[held_out]
    normalizer = _fit(blocks, train, spec, config)
    lengths = blocks.lengths[train]
    num_known = int(lengths.sum() - (blocks.endings[train] == HIDDEN).sum())
    notes = notes_on_data(ranges, spec, config, num_known=num_known, num_transitions=int(lengths.sum())) + notes
    values, length = None, window_length_of(config)
    if learned is not None:
        above = learned.above(blocks.take(train), length=length, discount=settings.discount)
        values = learned.inside(normalizer, above)
    layout = Layout(
        spec=spec,
        normalizer=normalizer,
        values=values,
        train=train,
        validation=validation,
        sizes=_sizes(blocks, train, config),
        notes=notes,
        takes_logged_returns=blocks.has_returns,
        discount=settings.discount,
        length=length,
        held_out=hold_out(
            map(blocks.take, blocks.chunks(validation)), map(blocks.take, blocks.chunks(train)), normalizer, config
        ),
    )
    return layout, blocks


def hold_out(
    held_out: Iterable[TransitionDataset], train: Iterable[TransitionDataset], normalizer: Normalizer, config: RunConfig
) -> HeldOutEpisodes | None:
    """The held-out episodes that evaluations replay, or that a world model is tried on.

    None where there are none, and for policies that have an environment.
    """
    if config.env_id is not None and declaration_of(config).acts:
        return None
    discount = config.data.discount
    kept = [replace(part, returns_to_go=part.to_go(discount)) for part in held_out if part.num_episodes]
    if not kept:
        return None
    starts = [EpisodeStarts.of(part, discount=discount) for part in kept]

    def with_starts() -> Iterator[TransitionDataset]:
        for part in train:
            starts.append(EpisodeStarts.of(part, discount=discount))
            yield part

    cloning = LinearCloning.fit(with_starts(), normalizer)
    return HeldOutEpisodes(
        episodes=replayed_part(join_episodes(kept)),
        cloning=cloning,
        normalizer=normalizer,
        starts=EpisodeStarts.joined(starts),
    )


def _sizes(blocks: EpisodeBlocks, train: Int[ndarray, "T"], config: RunConfig) -> Int[ndarray, "D"]:
    mix, lengths = config.data.mix, blocks.lengths[train]
    if not mix:
        return np.array([lengths.sum()])  # episode ids may be anything
    sources = blocks.episode_ids[train] >> SOURCE_BITS
    sizes = np.bincount(sources, weights=lengths, minlength=len(mix)).astype(int)
    for path, size in zip(mix, sizes, strict=False):
        if size == 0:
            raise DataError(f"no episode of {path} is left to train on, and data.mix gives it a share")
    return sizes


def _fit(blocks: EpisodeBlocks, train: Int[ndarray, "T"], spec: SpaceSpec, config: RunConfig) -> Normalizer:
    """`Normalizer.fit` of these episodes."""
    chunks, scale, discount = blocks.chunks(train), config.data.return_scale, config.data.discount
    if scale is None:
        tails = _find_tails(blocks, chunks, np.float32(1.0), discount=discount)
        largest = max(
            float(np.abs(part.to_go(discount, tail)).max())
            for part, tail in zip(map(blocks.take_rewards, chunks), tails, strict=True)
        )
        scale = 1 / largest if largest > 0 else 1.0

    def observations() -> Iterator[ndarray]:
        for chunk in chunks:
            yield blocks.columns(["observations"], chunk)[0]

    units = Normalizer.of(*mean_and_std(observations), spec, return_scale=scale)
    if discount == 1.0:
        return units
    shown = _shown_returns(map(blocks.take_rewards, chunks), config)
    return replace(
        units, discount=discount, to_go_bounds=bounds_by_timestep(shown, max_timesteps=config.model.max_timesteps)
    )


def _shown_returns(parts: Iterable[TransitionDataset], config: RunConfig) -> Iterator[tuple[ndarray, ndarray]]:
    """The returns-to-go that windows of these episodes show, and their timesteps."""
    discount, length = config.data.discount, window_length_of(config)
    for part in parts:
        if config.relabels:
            for rows, returns in places_in_windows(part, length=length, discount=discount):
                yield returns, part.timesteps[rows]
        else:
            yield part.to_go(discount), part.timesteps


def _find_tails(
    blocks: EpisodeBlocks, chunks: Sequence[Int[ndarray, "_"]], scale: np.float32, *, discount: float
) -> list[Tail | None]:
    """The tail of each chunk's rewards times `scale`; None where returns-to-go are logged or discounted."""
    if blocks.has_returns or discount != 1.0:
        return [None] * len(chunks)
    parts = map(blocks.take_rewards, reversed(chunks))
    return [*reversed(find_tails((part.rewards * scale, part.starts) for part in parts))]


def notes_on_data(
    ranges: Ranges, spec: SpaceSpec, config: RunConfig, *, num_known: int, num_transitions: int
) -> tuple[str, ...]:
    """What looks wrong with the data of a run, one line each.

    `num_known` of the transitions to train on have a successor in the log, or none because the environment ended there.

    Raises:
        DataError: nothing would be trained.
    """
    notes = list(range_traps(ranges, spec, config.data.columns))
    if declaration_of(config).needs_next_steps and num_known < num_transitions:
        hidden = (
            f"{config.algorithm} learns values from a step and what came next, and of {num_transitions - num_known} of "
            f"{num_transitions} steps the log does not say what came next: they are last in their episodes, which the "
            f"environment did not end"
        )
        way_out = "name the column of it with data.columns.next_observation=NAME"
        if num_known == 0:
            raise DataError(f"{', '.join(config.data.paths)} trains nothing: {hidden}; {way_out}")
        if num_known < num_transitions / 2:
            notes.append(f"{hidden}; {way_out}")
    return tuple(notes)


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

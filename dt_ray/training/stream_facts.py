"""What a streaming run knows before it trains, and cutting and laying out the episodes that it reads.

Legend: E episodes, T of them to train on, H held out, W used of those, S observation dimension.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Int
from numpy import ndarray

from dt_ray.config.schema import DataConfig, RunConfig
from dt_ray.data.held_out import HeldOutEpisodes
from dt_ray.data.logs.files import DatasetFile
from dt_ray.data.normalizer import Normalizer
from dt_ray.data.ranges import Ranges
from dt_ray.data.spaces import SpaceSpec, with_data_bounds
from dt_ray.data.transitions import TransitionDataset, chosen_episodes, held_out_episodes
from dt_ray.data.windows import WindowTable
from dt_ray.errors import DataError
from dt_ray.learners import window_length_of
from dt_ray.training.file_facts import FileFacts
from dt_ray.training.layout import hold_out, notes_on_data

VALIDATION_SHARE = 1 / 12  # of a node's memory


@dataclass(frozen=True, kw_only=True)
class StreamingData:
    """What a streaming run knows before it trains: files, training episodes, units, and the held-out episodes."""

    spec: SpaceSpec
    normalizer: Normalizer
    files: Sequence[DatasetFile]  # that have episodes to train on
    train_ids: Int[ndarray, "E"]  # sorted
    train_lengths: Sequence[Int[ndarray, "_"]]  # of the training episodes of each of `files`, in its order
    num_transitions: int  # to train on
    validation: WindowTable | None
    num_skipped_files: int
    notes: tuple[str, ...] = ()  # what looks wrong with the data, though it can be trained on
    held_out: HeldOutEpisodes | None = None

    @classmethod
    def build(
        cls,
        files: Sequence[DatasetFile],
        facts: FileFacts,
        *,
        num_skipped_files: int = 0,
    ) -> StreamingData:
        """Splits episodes and fits units by the facts of all episodes, and reads some held-out episodes.

        Raises:
            DataError: a file can't be trained on, too few episodes to hold any out, or fewer files than workers.
        """
        config, spec, settings = facts.config, facts.spec, facts.config.data
        assert spec is not None
        files = facts.divided(files)
        statistics = facts.of_episodes(files)
        _check_dimensions(files, statistics)
        ids, lengths, places = (statistics[name].to_numpy() for name in ("episode_id", "length", "file"))
        chosen = chosen_episodes(
            ids, statistics["return"].to_numpy(), max_episodes=settings.max_episodes, top_fraction=settings.top_fraction
        )
        are_held_out = held_out_episodes(len(chosen), settings.validation_fraction, seed=config.seed)
        train = np.delete(chosen, are_held_out)
        train_files = _files_at(files, places[train])
        if len(train_files) < (num := config.scaling.max_workers):
            raise DataError(
                f"{settings.path} has {len(train_files)} file(s) to train on for {num} workers, who stream whole "
                f"files; write more of them, use fewer workers or set data.residency=resident"
            )
        ranges = _ranges(statistics)
        spec = with_data_bounds(spec, settings.action_bounds, *ranges.actions)
        normalizer = _fit(statistics, train, spec, settings)
        if settings.discount < 1.0:
            bounds = facts.bounds(train_files, ids[train])
            normalizer = replace(normalizer, discount=settings.discount, to_go_bounds=bounds)
        num_known = int((lengths[train] - 1 + statistics["is_end_known"].to_numpy()[train]).sum())
        notes = notes_on_data(ranges, spec, config, num_known=num_known, num_transitions=int(lengths[train].sum()))
        most = capacity_of(config, spec, share=VALIDATION_SHARE)
        shown, fitted = (_first_within(episodes, lengths, most) for episodes in (chosen[are_held_out], train))
        held_out = list(facts.read(_files_at(files, places[shown]), ids[shown]))
        validation = [in_units(part, config, normalizer) for part in held_out]
        baseline = facts.read(_files_at(files, places[fitted]), ids[fitted])  # not read where not needed
        return cls(
            spec=spec,
            normalizer=normalizer,
            files=train_files,
            train_ids=np.sort(ids[train]),
            train_lengths=[lengths[rows] for rows in _rows_by_file(places, np.sort(train))],
            num_transitions=int(lengths[train].sum()),
            validation=lay_out(validation, config) if validation else None,
            num_skipped_files=num_skipped_files,
            notes=notes,
            held_out=hold_out(held_out, baseline, normalizer, config),
        )


def cut_long(data: TransitionDataset, longest: int) -> Iterator[TransitionDataset]:
    """Splits data into parts of at most `longest` steps; pieces of long episodes keep timesteps and returns-to-go."""
    for episodes in _episodes_within(data.lengths, longest):
        part = data.select(episodes)
        yield from part.pieces(longest) if part.num_transitions > longest else (part,)


def lengths_cut_long(lengths: Int[ndarray, "E"], longest: int) -> Iterator[int]:
    """The steps of each part into which `cut_long` splits episodes of these lengths."""
    for episodes in _episodes_within(lengths, longest):
        num = int(lengths[episodes].sum())
        yield from (min(longest, num - begin) for begin in range(0, num, longest))


def _episodes_within(lengths: Int[ndarray, "E"], longest: int) -> Iterator[range]:
    """Runs of episodes that together have at most `longest` steps; a longer episode is a run of its own."""
    ends = np.cumsum(lengths)
    begin = 0
    while begin < len(lengths):
        limit = ends[begin] - lengths[begin] + longest
        end = max(begin + 1, int(np.searchsorted(ends, limit, side="right")))
        yield range(begin, end)
        begin = end


def capacity_of(config: RunConfig, spec: SpaceSpec, *, share: float) -> int:
    """The number of transitions, laid out for windows, that fit into a share of `data.memory_mb`."""
    width = spec.observation_dim + spec.action_dim + 1
    return max(config.optim.batch_size, int(share * config.data.memory_mb * 2**20 / (4 * width)))


def in_units(data: TransitionDataset, config: RunConfig, normalizer: Normalizer) -> TransitionDataset:
    """The same episodes in the model's units and with their returns-to-go."""
    data = normalizer.normalize(data)
    return replace(data, returns_to_go=data.to_go(config.data.discount))


def lay_out(parts: Sequence[TransitionDataset], config: RunConfig) -> WindowTable:
    length, discount = window_length_of(config), config.data.discount
    return WindowTable.build(parts, length=length, discount=discount, is_relabeled=config.relabels)


def _check_dimensions(files: Sequence[DatasetFile], statistics: pa.Table) -> None:
    """Raises:
    DataError: two files hold observations of different dimensions.
    """
    dimensions = statistics["mean"].combine_chunks().value_lengths().to_numpy(zero_copy_only=False)
    if len(wrong := np.flatnonzero(dimensions != dimensions[0])):
        first, other = (files[statistics["file"][int(at)].as_py()].path for at in (0, wrong[0]))
        raise DataError(
            f"{first} has observations of {dimensions[0]} dimension(s) but {other} of {dimensions[wrong[0]]}; "
            f"a dataset has files of one kind"
        )


def _files_at(files: Sequence[DatasetFile], places: Int[ndarray, "*any"]) -> list[DatasetFile]:
    return [files[place] for place in np.unique(places).tolist()]


def _rows_by_file(places: Int[ndarray, "E"], rows: Int[ndarray, "T"]) -> list[Int[ndarray, "_"]]:
    """The sorted rows, apart for each file; rows of a file follow one another."""
    return np.split(rows, np.flatnonzero(np.diff(places[rows])) + 1)


def _first_within(episodes: Int[ndarray, "H"], lengths: Int[ndarray, "E"], budget: int) -> Int[ndarray, "W"]:
    """The first of these episodes, as many as a budget of steps allows, but at least one if there is any."""
    num = int(np.searchsorted(np.cumsum(lengths[episodes]), budget, side="right"))
    return episodes[: max(1, num)]


def _fit(statistics: pa.Table, train: Int[ndarray, "T"], spec: SpaceSpec, settings: DataConfig) -> Normalizer:
    """`Normalizer.fit` of the training episodes, from the facts of all episodes (Chan et al. 1983)."""
    rows = statistics.take(pa.array(train))
    lengths = rows["length"].to_numpy().astype(np.float64)
    mean, squares = (_matrix(rows[name]) for name in ("mean", "squares"))
    total_mean = lengths @ mean / lengths.sum()
    std = np.sqrt((squares.sum(axis=0) + lengths @ (mean - total_mean) ** 2) / lengths.sum())
    largest = float(rows["largest_to_go"].to_numpy().max())
    return Normalizer.of(
        total_mean, std, spec, return_scale=settings.return_scale or (1 / largest if largest > 0 else 1.0)
    )


def _ranges(statistics: pa.Table) -> Ranges:
    extremes = {
        f"{name}s": np.stack(
            [_matrix(statistics[f"lowest_{name}"]).min(axis=0), _matrix(statistics[f"highest_{name}"]).max(axis=0)]
        )
        for name in ("observation", "action")
    }
    return Ranges(
        **extremes,
        changes=_matrix(statistics["change"])[0],
        **{name: statistics[name].to_numpy() for name in ("largest_reward", "usual_reward")},
    )


def _matrix(column: pa.ChunkedArray) -> Float[ndarray, "E S"]:
    return column.combine_chunks().flatten().to_numpy().reshape(len(column), -1)

"""Facts about streamed data that are gathered file by file before training, and reading its episodes.

Legend: E episodes, T of them to train on, H held out, W used of those, S observation dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Int
from numpy import ndarray

from dt_ray.config.schema import DataConfig, RunConfig
from dt_ray.data.held_out import HeldOutEpisodes
from dt_ray.data.logs.files import DatasetFile
from dt_ray.data.logs.reading import read_episodes
from dt_ray.data.normalizer import Normalizer
from dt_ray.data.ranges import Ranges
from dt_ray.data.returns import bounds_by_timestep, join_bounds
from dt_ray.data.spaces import SpaceSpec, with_data_bounds
from dt_ray.data.transitions import TransitionDataset, chosen_episodes, held_out_episodes
from dt_ray.data.windows import WindowTable
from dt_ray.errors import DataError
from dt_ray.learners import return_source_of, window_length_of
from dt_ray.training.layout import check_length, hold_out, notes_on_data

VALIDATION_SHARE = 1 / 12  # of a node's memory


def episode_statistics(file: DatasetFile, config: RunConfig, spec: SpaceSpec) -> pa.Table:
    """A row for each episode of a file, with the facts that a run needs about all episodes before it trains.

    Raises:
        DataError: the file can't be trained on, or an episode is longer than the model's timestep table.
    """
    data = read_episodes(file, config.data, spec)
    for index, length in enumerate(data.lengths):
        check_length(int(data.episode_ids[index]), int(length), config)
    data = data.with_return_source(return_source_of(config))
    observations = data.observations.astype(np.float64)
    mean = np.add.reduceat(observations, data.starts) / data.lengths[:, None]
    ranges = Ranges.of(data)
    deviation = observations - np.repeat(mean, data.lengths, axis=0)
    return pa.table(
        {
            "file": np.full(data.num_episodes, file.index),
            "episode_id": data.episode_ids,
            "length": data.lengths,
            "return": data.episode_returns,
            "largest_to_go": np.maximum.reduceat(np.abs(data.to_go(config.data.discount)), data.starts),
            "mean": list(mean),
            "squares": list(np.add.reduceat(deviation**2, data.starts)),
            "is_end_known": data.are_ends_known,
            "change": [ranges.changes] * data.num_episodes,
            "largest_reward": ranges.largest_reward,
            "usual_reward": ranges.usual_reward,
            **{
                f"{extreme}_{name}": list(choose.reduceat(getattr(data, f"{name}s"), data.starts))
                for extreme, choose in (("lowest", np.minimum), ("highest", np.maximum))
                for name in ("observation", "action")
            },
        }
    )


def file_bounds(file: DatasetFile, *, ids: Int[ndarray, "E"], config: RunConfig, spec: SpaceSpec) -> ndarray:
    """`bounds_by_timestep` of the file's episodes among these sorted ids, in the environment's units."""
    data = _chosen(read_episodes(file, config.data, spec), ids, config)
    shown = [(data.to_go(config.data.discount), data.timesteps)]
    return bounds_by_timestep(shown, max_timesteps=config.model.max_timesteps)


@dataclass(frozen=True, kw_only=True)
class StreamingData:
    """What a streaming run knows before it trains: files, training episodes, units, and the held-out episodes."""

    spec: SpaceSpec
    normalizer: Normalizer
    files: Sequence[DatasetFile]  # that have episodes to train on
    train_ids: Int[ndarray, "E"]  # sorted
    num_transitions: int  # to train on
    validation: WindowTable | None
    num_skipped_files: int
    notes: tuple[str, ...] = ()  # what looks wrong with the data, though it can be trained on
    held_out: HeldOutEpisodes | None = None

    @classmethod
    def build(
        cls,
        files: Sequence[DatasetFile],
        statistics: pa.Table,
        spec: SpaceSpec,
        config: RunConfig,
        *,
        num_skipped_files: int = 0,
        for_each: Callable[[Callable[[DatasetFile], Any], Sequence[DatasetFile]], Iterable[Any]] = map,
    ) -> StreamingData:
        """Splits episodes and fits units by the rows of `episode_statistics`, and reads some held-out episodes.

        With a discount below 1 `for_each` reads the files once more, for the bounds of returns-to-go.

        Raises:
            DataError: too few episodes to hold any out, or fewer files than workers.
        """
        settings = config.data
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
            find = partial(file_bounds, ids=np.sort(ids[train]), config=config, spec=spec)
            normalizer = replace(
                normalizer, discount=settings.discount, to_go_bounds=join_bounds(for_each(find, train_files))
            )
        num_known = int((lengths[train] - 1 + statistics["is_end_known"].to_numpy()[train]).sum())
        notes = notes_on_data(ranges, spec, config, num_known=num_known, num_transitions=int(lengths[train].sum()))
        most = capacity_of(config, spec, share=VALIDATION_SHARE)
        shown, fitted = (_first_within(episodes, lengths, most) for episodes in (chosen[are_held_out], train))
        held_out = list(read_chosen(_files_at(files, places[shown]), ids[shown], config, spec))
        validation = [in_units(part, config, normalizer) for part in held_out]
        baseline = read_chosen(_files_at(files, places[fitted]), ids[fitted], config, spec)  # not read where not needed
        return cls(
            spec=spec,
            normalizer=normalizer,
            files=train_files,
            train_ids=np.sort(ids[train]),
            num_transitions=int(lengths[train].sum()),
            validation=lay_out(validation, config) if validation else None,
            num_skipped_files=num_skipped_files,
            notes=notes,
            held_out=hold_out(held_out, baseline, normalizer, config),
        )


def cut_long(data: TransitionDataset, longest: int) -> Iterator[TransitionDataset]:
    """Splits data into parts of at most `longest` steps; pieces of long episodes keep timesteps and returns-to-go."""
    begin = 0
    while begin < data.num_episodes:
        end = max(begin + 1, int(np.searchsorted(data.ends, data.starts[begin] + longest, side="right")))
        part = data.select(range(begin, end))
        yield from part.pieces(longest) if part.num_transitions > longest else (part,)
        begin = end


def capacity_of(config: RunConfig, spec: SpaceSpec, *, share: float) -> int:
    """The number of transitions, laid out for windows, that fit into a share of `data.memory_mb`."""
    width = spec.observation_dim + spec.action_dim + 1
    return max(config.optim.batch_size, int(share * config.data.memory_mb * 2**20 / (4 * width)))


def read_chosen(
    files: Sequence[DatasetFile], ids: Int[ndarray, "E"], config: RunConfig, spec: SpaceSpec
) -> Iterator[TransitionDataset]:
    """The files' episodes among these ids, file by file, of files that have any."""
    ids = np.sort(ids)
    for file in files:
        data = _chosen(read_episodes(file, config.data, spec), ids, config)
        if data.num_episodes:
            yield data


def in_units(data: TransitionDataset, config: RunConfig, normalizer: Normalizer) -> TransitionDataset:
    """The same episodes in the model's units and with their returns-to-go."""
    data = normalizer.normalize(data)
    return replace(data, returns_to_go=data.to_go(config.data.discount))


def _chosen(data: TransitionDataset, ids: Int[ndarray, "E"], config: RunConfig) -> TransitionDataset:
    """The episodes among these sorted ids."""
    places = np.minimum(np.searchsorted(ids, data.episode_ids), len(ids) - 1)
    return data.select(np.flatnonzero(ids[places] == data.episode_ids)).with_return_source(return_source_of(config))


def lay_out(parts: Sequence[TransitionDataset], config: RunConfig) -> WindowTable:
    return WindowTable.build(parts, length=window_length_of(config), discount=config.data.discount)


def _check_dimensions(files: Sequence[DatasetFile], statistics: pa.Table) -> None:
    """Raises:
    DataError: two files hold observations of different dimensions.
    """
    dimensions = statistics["mean"].combine_chunks().value_lengths().to_numpy(zero_copy_only=False)
    if len(wrong := np.flatnonzero(dimensions != dimensions[0])):
        paths = {file.index: file.path for file in files}
        first, other = (paths[statistics["file"][int(at)].as_py()] for at in (0, wrong[0]))
        raise DataError(
            f"{first} has observations of {dimensions[0]} dimension(s) but {other} of {dimensions[wrong[0]]}; "
            f"a dataset has files of one kind"
        )


def _files_at(files: Sequence[DatasetFile], indices: Int[ndarray, "*any"]) -> list[DatasetFile]:
    wanted = set(indices.tolist())
    return [file for file in files if file.index in wanted]


def _first_within(episodes: Int[ndarray, "H"], lengths: Int[ndarray, "E"], budget: int) -> Int[ndarray, "W"]:
    """The first of these episodes, as many as a budget of steps allows, but at least one if there is any."""
    num = int(np.searchsorted(np.cumsum(lengths[episodes]), budget, side="right"))
    return episodes[: max(1, num)]


def _fit(statistics: pa.Table, train: Int[ndarray, "T"], spec: SpaceSpec, settings: DataConfig) -> Normalizer:
    """`Normalizer.fit` of the training episodes, from the rows of `episode_statistics` (Chan et al. 1983)."""
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

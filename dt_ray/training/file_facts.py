"""Facts about all episodes of a dataset that streams, gathered file by file before it is trained on.

Legend: E episodes, K timesteps, S observation dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Int
from numpy import ndarray

from dt_ray.config.schema import BATCH_SETTINGS, DataConfig, RunConfig
from dt_ray.data.logs.files import DatasetFile
from dt_ray.data.logs.looks import FileShape
from dt_ray.data.logs.numbering import own_ids
from dt_ray.data.logs.outline import outline_rows
from dt_ray.data.logs.reading import check_alike, fault_in_file, read_episodes, read_fragments, warn_of
from dt_ray.data.logs.row_ranges import divided, find_ranges, may_have_ranges
from dt_ray.data.logs.sources import read_episode_ids, sound_files
from dt_ray.data.ranges import Ranges
from dt_ray.data.returns import bounds_by_timestep, join_bounds
from dt_ray.data.spaces import SpaceSpec
from dt_ray.data.transitions import TransitionDataset
from dt_ray.errors import DataError
from dt_ray.learners import return_source_of
from dt_ray.training.fact_store import FactStore
from dt_ray.training.layout import check_length

ForEach = Callable[[Callable[[DatasetFile], Any], Sequence[DatasetFile]], Iterable[Any]]  # `map`, or tasks of Ray's

# Settings of `data` that matter only after the episodes are read.
SETTINGS_READ_LATER = ("max_episodes", "top_fraction", "return_source", "values", "return_scale", *BATCH_SETTINGS,
                       "discount", "validation_fraction", "window_length")  # fmt: skip
# Settings that change no number of a file: `action_bounds` are a part of the spaces.
SETTINGS_WITHOUT_EFFECT = ("collect", "residency", "memory_mb", "on_corrupt", "action_bounds")


class FileFacts:
    """Reads files for their facts, by `for_each`; facts that an earlier run gathered are not gathered again."""

    def __init__(self, config: RunConfig, spec: SpaceSpec | None, *, for_each: ForEach = map) -> None:
        self.config, self.spec, self.for_each = config, spec, for_each
        names = (*SETTINGS_READ_LATER, *SETTINGS_WITHOUT_EFFECT)
        settings = replace(config.data, **{name: getattr(DataConfig(), name) for name in names})
        self._read_by = (
            replace(settings, columns=dict(sorted(settings.columns.items()))),
            spec,
            return_source_of(config),
            config.data.discount,
        )
        self._episodes = FactStore(config.storage_path, "episodes", *self._read_by)

    def sound_files(self) -> tuple[list[DatasetFile], int]:
        """`sound_files` of the run; with `data.on_corrupt=skip` a file that may be streamed is read once for all.

        Raises:
            DataError: as `sound_files`.
        """
        return sound_files(self.config.data, self._faults_of, self._ids_of)

    def divided(self, files: Sequence[DatasetFile]) -> list[DatasetFile]:
        """The files, large ones by ranges of their rows."""
        return divided(files, self.config.data, partial(self.for_each, partial(find_ranges, config=self.config.data)))

    def of_episodes(self, files: Sequence[DatasetFile]) -> pa.Table:
        """A row for each episode with the facts of `episode_facts`, the place of its `file` among these, and its id.

        Raises:
            DataError: a file can't be trained on, or an episode is longer than the model's timestep table.
        """
        look = partial(episode_facts, config=self.config, spec=self.spec)
        found = self._episodes.gather(files, partial(self.for_each, look))
        tables = [_numbered(facts, place, files[place], self.config.data) for place, facts in enumerate(found)]
        table = pa.concat_tables(tables)
        lengths = table["length"].to_numpy()
        longest = int(lengths.argmax())
        check_length(table["episode_id"][longest].as_py(), int(lengths[longest]), self.config)
        return table

    def outline(self, files: Sequence[DatasetFile]) -> list[pa.Table]:
        """The rows of each file for `make_outline`; logs what looks wrong with the files.

        Raises:
            DataError: a file can't be read, or the files hold vectors of different dimensions.
        """
        store = FactStore(self.config.storage_path, "outline", *self._read_by, self.config.relabels)
        files = self.divided(files)
        found = store.gather(files, partial(self.for_each, partial(_outline_of, config=self.config)))
        shapes = [
            FileShape(file.path, (facts["observation_dim"][0].as_py(), len(facts["lowest_action"][0])), False)
            for file, facts in zip(files, found, strict=True)
        ]
        for shape in shapes:
            check_alike(shapes[0], shape)
        warn_of(facts["doubt"][0].as_py() for facts in found)
        return [_numbered(facts, place, files[place], self.config.data) for place, facts in enumerate(found)]

    def bounds(self, files: Sequence[DatasetFile], ids: Int[ndarray, "E"]) -> Float[ndarray, "2 K"]:
        """`bounds_by_timestep` of the files' episodes among these ids, in the environment's units.

        The ids are part of what the bounds depend on, and so all files are read again where one is new.
        """
        ids = np.sort(ids)
        max_timesteps = self.config.model.max_timesteps
        store = FactStore(self.config.storage_path, "bounds", *self._read_by, max_timesteps, ids.tobytes())
        look = partial(_bounds_of, ids=ids, config=self.config, spec=self.spec)
        found = store.gather(files, partial(self.for_each, look))
        return join_bounds(np.stack([each["lowest"].to_numpy(), each["highest"].to_numpy()]) for each in found)

    def read(self, files: Sequence[DatasetFile], ids: Int[ndarray, "E"]) -> Iterator[TransitionDataset]:
        """The files' episodes among these ids, of each file that has any; nothing is read before the first is taken."""
        look = partial(read_chosen, ids=np.sort(ids), config=self.config, spec=self.spec)
        yield from (data for data in self.for_each(look, files) if data.num_episodes)

    def _faults_of(self, files: Sequence[DatasetFile]) -> list[str | None]:
        settings = self.config.data
        find_fault = partial(fault_in_file, config=settings, spec=self.spec)
        if settings.residency in ("resident", "dataset") or settings.mix or self.config.relabels:
            return list(self.for_each(find_fault, files))
        at_once = [file for file in files if not may_have_ranges(file, settings)]
        look = partial(_facts_or_fault, config=self.config, spec=self.spec)
        known = iter(self._episodes.gather(at_once, partial(self.for_each, look)))
        by_ranges = iter(self.for_each(find_fault, [file for file in files if may_have_ranges(file, settings)]))
        found = [next(by_ranges if may_have_ranges(file, settings) else known) for file in files]
        return [each if isinstance(each, str) else None for each in found]

    def _ids_of(self, files: Sequence[DatasetFile]) -> list[Int[ndarray, "E"]]:
        known = [self._episodes.of(file) for file in files]
        unknown = [file for file, facts in zip(files, known, strict=True) if facts is None]
        found = iter(self.for_each(read_episode_ids, unknown))
        return [next(found) if facts is None else facts["episode_id"].to_numpy() for facts in known]


def episode_facts(file: DatasetFile, config: RunConfig, spec: SpaceSpec | None) -> pa.Table:
    """A row for each episode of a file, with what a run needs to know of all episodes; ids are the logged ones.

    Raises:
        DataError: the file can't be trained on.
    """
    return _facts_of(read_fragments(file, config.data, spec, with_own_ids=False).data, config)


def _outline_of(file: DatasetFile, config: RunConfig) -> pa.Table:
    found = read_fragments(file, config.data, None, with_own_ids=False)
    rows = outline_rows(found.data, config, return_source_of(config))
    return rows.append_column("doubt", pa.array([found.doubt] * len(rows), pa.string()))


def _facts_or_fault(file: DatasetFile, config: RunConfig, spec: SpaceSpec | None) -> pa.Table | str:
    """`episode_facts`, or why the file can't be trained on."""
    try:
        data = read_fragments(file, config.data, spec, with_own_ids=False).data
    except DataError as error:
        return str(error)
    return _facts_of(data, config)


def _facts_of(data: TransitionDataset, config: RunConfig) -> pa.Table:
    data = data.with_return_source(return_source_of(config))
    observations = data.observations.astype(np.float64)
    mean = np.add.reduceat(observations, data.starts) / data.lengths[:, None]
    ranges = Ranges.of(data)
    deviation = observations - np.repeat(mean, data.lengths, axis=0)
    return pa.table(
        {
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


def _numbered(facts: pa.Table, place: int, file: DatasetFile, config: DataConfig) -> pa.Table:
    """The facts of a file as one of several: with its place among them, and ids that no other has."""
    ids = own_ids(facts["episode_id"].to_numpy(), file, config) if file.rows is None else file.rows.ids
    at = facts.column_names.index("episode_id")
    places = pa.array(np.full(len(facts), place))
    return facts.set_column(at, "episode_id", pa.array(ids)).append_column("file", places)


def _bounds_of(file: DatasetFile, ids: Int[ndarray, "E"], config: RunConfig, spec: SpaceSpec | None) -> pa.Table:
    data = read_chosen(file, ids, config, spec)
    shown = [(data.to_go(config.data.discount), data.timesteps)]
    bounds = bounds_by_timestep(shown, max_timesteps=config.model.max_timesteps)
    return pa.table({"lowest": bounds[0], "highest": bounds[1]})


def read_chosen(
    file: DatasetFile, ids: Int[ndarray, "E"], config: RunConfig, spec: SpaceSpec | None
) -> TransitionDataset:
    """The file's episodes among these sorted ids."""
    data = read_episodes(file, config.data, spec)
    places = np.minimum(np.searchsorted(ids, data.episode_ids), len(ids) - 1)
    chosen = np.flatnonzero(ids[places] == data.episode_ids) if len(ids) else np.empty(0, np.int64)
    return data.select(chosen).with_return_source(return_source_of(config))

"""Facts about a file that reading other files needs: the episodes in it, and the dimensions of its vectors."""

from __future__ import annotations

from contextlib import suppress
from hashlib import blake2b
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Int
from numpy import ndarray

from dt_ray.config.schema import DataConfig
from dt_ray.data.formats import has_rows, read_minari, read_rows
from dt_ray.data.formats.tables import read_parquet
from dt_ray.data.logs.episodes import from_table
from dt_ray.data.logs.files import DatasetFile, find_files
from dt_ray.data.logs.flat import find_episodes, read_vectors
from dt_ray.data.logs.names import SIGNALS
from dt_ray.data.logs.plan import FileEpisodes
from dt_ray.data.spaces import SpaceSpec, spaces_of_log
from dt_ray.data.transitions import TransitionDataset
from dt_ray.errors import DataError


def look_into(file: DatasetFile, config: DataConfig) -> FileEpisodes:
    """Which episodes have rows in a flat file, and how they begin and end there.

    Raises:
        DataError: the file is unreadable or empty, or what is one episode can't be told.
    """
    wanted = ["episode_id", "timestep", *SIGNALS]
    rows, names = read_rows(file, config, wanted, observations_too=lambda names: "timestep" not in names)
    found, ends, times, doubt = find_episodes(
        rows, names, time_limit=config.time_limit, is_one=config.episode_per_file, source=file.path
    )
    num = len(rows)
    order = np.arange(num) if found.order is None else found.order
    first, last = order[found.starts], order[np.append(found.starts[1:], num) - 1]
    unknown = np.full(len(first), np.nan)
    episode_of = np.empty(num, np.int64)
    episode_of[order] = np.repeat(np.arange(len(first)), np.diff(np.append(found.starts, num)))
    before = after = np.zeros(len(first), np.int64)
    if "next_observation" in names and "timestep" not in names:
        before = _digests(read_vectors(rows.take(pa.array(first)), names, "observation", source=file.path))
        after = _digests(read_vectors(rows.take(pa.array(last)), names, "next_observation", source=file.path))
    return FileEpisodes(
        labels=[found.label(i) if found.labels.texts is not None else int(found.ids[i]) for i in range(len(first))],
        are_logged="episode_id" in names,
        are_shared=bool(names.get("episode_id")) and set(names["episode_id"]) <= set(file.partitions),
        ended=ends.ended[last],
        num_steps=np.diff(np.append(found.starts, num)),
        first=unknown if times is None else np.minimum.reduceat(times[order], found.starts),
        last=unknown if times is None else np.maximum.reduceat(times[order], found.starts),
        before=before,
        after=after,
        opens=int(episode_of[0]),
        closes=int(episode_of[-1]),
        opens_marked=None if ends.starts is None else bool(ends.starts[0]),
        doubt=doubt,
    )


def _digests(observations: Float[ndarray, "E S"]) -> Int[ndarray, "E"]:
    """A hash of each observation, never 0; 0 where an observation is missing."""
    rows = np.ascontiguousarray(observations)
    digests = [int.from_bytes(blake2b(row.tobytes(), digest_size=7).digest(), "little") + 1 for row in rows]
    return np.where(np.isnan(rows).any(axis=1), 0, np.asarray(digests, np.int64))


class FileShape(NamedTuple):
    """The properties that all files of a dataset share."""

    path: str
    dimensions: tuple[int, int]  # of observations and of actions
    has_returns: bool  # a column of returns-to-go

    @classmethod
    def of(cls, file: DatasetFile, data: TransitionDataset) -> FileShape:
        return cls(file.path, (data.observations.shape[1], data.actions.shape[1]), data.returns_to_go is not None)


def read_log_spaces(config: DataConfig) -> SpaceSpec:
    """The spaces of a log without an environment, by its first file, or the first that can be read.

    Raises:
        DataError: the first file can't be read, and is not to be left out; or none can.
    """
    files = find_files(config.paths[0], config.format)
    for file in files[:-1] if config.on_corrupt == "skip" else []:
        with suppress(DataError):  # which is logged where the files to train on are chosen
            return spaces_of_log(*read_shape_of(file, config).dimensions)
    return spaces_of_log(*read_shape_of(files[-1 if config.on_corrupt == "skip" else 0], config).dimensions)


def read_shape_of(file: DatasetFile, config: DataConfig) -> FileShape:
    """The dimensions of the file's vectors, from its first row where that can be read alone.

    Raises:
        DataError: the file is unreadable, or has no vectors.
    """
    if not has_rows(file):
        is_ours = file.format == "parquet"
        head = from_table(read_parquet(file, num_rows=1), source=file.path) if is_ours else read_minari(file)
        return FileShape.of(file, head)
    rows, names = read_rows(file, config, num_rows=1)
    if not len(rows):
        raise DataError(f"{file.path} is empty: there is no episode in it")
    observation, action = (read_vectors(rows, names, name, source=file.path) for name in ("observation", "action"))
    return FileShape(file.path, (observation.shape[1], action.shape[1]), "return_to_go" in names)

"""Minari datasets, HDF5 or Arrow, through their own library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from pyarrow import fs

from dt_ray.data.formats.pickles import as_vector
from dt_ray.data.logs.files import DatasetFile
from dt_ray.data.transitions import TransitionDataset, join_episodes
from dt_ray.errors import DataError


def read_minari_environment(file: DatasetFile) -> tuple[str | None, dict[str, Any]]:
    """The id and the arguments of the environment in which a dataset was recorded; (None, {}) if it names none."""
    try:
        from minari import MinariDataset

        spec = MinariDataset(Path(file.path) / "data").env_spec
    except Exception:  # reported when the episodes are read
        return None, {}
    return (None, {}) if spec is None else (spec.id, dict(spec.kwargs))


def read_minari(file: DatasetFile) -> TransitionDataset:
    """All episodes, each with the observation after its last step.

    Raises:
        DataError: the library is missing, or an episode's observations or actions aren't vectors.
    """
    try:
        from minari import MinariDataset
    except ImportError:
        raise DataError(f"{file.path} is a Minari dataset: pip install 'dt-ray[formats]'") from None
    if not isinstance(file.filesystem, fs.LocalFileSystem):
        raise DataError(f"{file.dataset}: Minari datasets are read from a local disk; download it first")
    episodes: list[TransitionDataset] = []
    try:
        found: list[Any] = list(MinariDataset(Path(file.path) / "data").iterate_episodes())
    except Exception as error:  # the library raises other errors for each kind of damage
        raise DataError(f"{file.path} is not a readable Minari dataset: {type(error).__name__}: {error}") from None
    for episode in found:
        num = len(episode.rewards)
        kinds: list[type] = [type(episode.observations), type(episode.actions)]
        if not all(issubclass(kind, np.ndarray) for kind in kinds):
            names = " and ".join(kind.__name__ for kind in kinds)
            raise DataError(f"{file.path}, episode {episode.id}: observations or actions are no vectors but {names}")
        if len(episode.observations) != num + 1 or len(episode.actions) != num or not num:
            raise DataError(
                f"{file.path}, episode {episode.id}: {len(episode.observations)} observations and "
                f"{len(episode.actions)} actions for {num} rewards; an episode has one observation more than steps"
            )
        observations = as_vector(episode.observations).reshape(num + 1, -1)
        episodes.append(
            TransitionDataset(
                observations=observations[:num],
                actions=as_vector(episode.actions).reshape(num, -1),
                rewards=as_vector(episode.rewards),
                terminated=np.asarray(episode.terminations, dtype=bool),
                truncated=np.asarray(episode.truncations, dtype=bool),
                starts=np.zeros(1, dtype=np.int64),
                final_observations=observations[num:],
            )
        )
    dimensions = sorted({(each.observations.shape[1], each.actions.shape[1]) for each in episodes})
    if len(dimensions) != 1:
        raise DataError(
            f"{file.path}: episodes of (observation, action) dimensions {dimensions or 'unknown: it is empty'}"
        )
    return join_episodes(episodes)

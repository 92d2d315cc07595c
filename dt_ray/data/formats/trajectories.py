"""The original Decision Transformer's pickled list of trajectories, decoded by an allow-list."""

from __future__ import annotations

import numpy as np

from dt_ray.config import DataConfig
from dt_ray.data.files import DatasetFile
from dt_ray.data.formats.arrays import episodes_of_arrays
from dt_ray.data.formats.pickles import load_arrays
from dt_ray.data.transitions import TransitionDataset, join_episodes
from dt_ray.errors import DataError


def read_trajectories(file: DatasetFile, config: DataConfig) -> TransitionDataset:
    """A list of dicts of arrays: observations, actions, rewards, terminals, and maybe next_observations.

    Raises:
        DataError: it is anything else; nothing in it is run.
    """
    with file.open() as stream:
        content = stream.read()
    try:
        trajectories = load_arrays(content)
    except DataError as error:
        raise DataError(f"{file.path}: {error}") from None
    if not isinstance(trajectories, list) or not all(isinstance(each, dict) for each in trajectories):
        raise DataError(
            f"{file.path} holds a {type(trajectories).__name__}, not a list of trajectories (dicts of arrays)"
        )
    return join_episodes(
        [
            episodes_of_arrays(
                {name: np.asarray(value) for name, value in each.items()} | {"episode_starts": np.zeros(1, int)},
                config,
                source=f"{file.path}, trajectory {number}",
            )
            for number, each in enumerate(trajectories)
        ]
    )

"""Arrays by name: the HDF5 of D4RL and d3rlpy, and the NPZ files of imitation and others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy import ndarray

from dt_ray.config import DataConfig
from dt_ray.data.files import DatasetFile
from dt_ray.data.formats.pickles import as_vector
from dt_ray.data.transitions import TransitionDataset, join_episodes
from dt_ray.errors import DataError

TERMINALS, TIMEOUTS, ENDS = ("terminals", "terminated", "dones"), ("timeouts", "truncated"), ("episode_terminals",)


def read_hdf5(file: DatasetFile, config: DataConfig) -> TransitionDataset:
    """D4RL, or d3rlpy in either version, told apart by the names of the arrays."""
    try:
        import h5py
    except ImportError:
        raise DataError(f"{file.path} is HDF5: pip install 'dt-ray[formats]'") from None
    with file.open() as stream, h5py.File(stream, "r") as arrays:
        if "columns" in arrays and "num_episodes" in arrays:
            return _read_d3rlpy(arrays)
        if "episode_0" in arrays:
            raise DataError(f"{file.path} is a part of a Minari dataset: give the folder that has data/ in it")
        wanted = {"observations", "actions", "rewards", "next_observations", *TERMINALS, *TIMEOUTS, *ENDS}
        named = {name: np.asarray(arrays[name]) for name in wanted if name in arrays}
    return episodes_of_arrays(named, config, source=file.path)


def read_npz(file: DatasetFile, config: DataConfig) -> TransitionDataset:
    """imitation's trajectories, or arrays under D4RL's names; arrays of objects are left unread."""
    with file.open() as stream:
        try:
            arrays = np.load(stream, allow_pickle=False)
            named = {name: arrays[name] for name in arrays.files if name != "infos"}
        except (ValueError, BadZipFile) as error:
            raise DataError(f"{file.path} is no NPZ of plain arrays: {error}") from None
    if {"obs", "acts", "rews", "indices", "terminal"} <= named.keys():
        return _read_imitation(named)
    return episodes_of_arrays(named, config, source=file.path)


def episodes_of_arrays(arrays: Mapping[str, ndarray], config: DataConfig, *, source: str) -> TransitionDataset:
    """Episodes out of arrays with a row per step, in order.

    They end where `terminals` or `timeouts` say so, at `episode_terminals`, before each of `episode_starts`, and after
    `data.time_limit` steps.

    Raises:
        DataError: a needed array is missing, or nothing says where episodes end.
    """
    missing = [name for name in ("observations", "actions", "rewards") if name not in arrays]
    if missing:
        raise DataError(f"{source}: no array {', '.join(missing)} among {', '.join(sorted(arrays))}")
    num = len(arrays["rewards"])
    terminated, cut = _any_of(arrays, TERMINALS, num), _any_of(arrays, TIMEOUTS, num) | _any_of(arrays, ENDS, num)
    if "episode_starts" in arrays:
        cut[np.asarray(arrays["episode_starts"])[1:] - 1] = True
    known = bool({*TERMINALS, *TIMEOUTS, *ENDS, "episode_starts"} & arrays.keys())
    if not known and config.time_limit is None:
        raise DataError(f"{source}: nothing says where episodes end; if all have the same length, set data.time_limit")
    if config.time_limit is not None:
        cut |= _at_limit(terminated | cut, config.time_limit)
    cut[-1:] |= ~terminated[-1:]
    data = TransitionDataset(
        observations=_matrix(arrays["observations"]),
        actions=_matrix(arrays["actions"]),
        rewards=as_vector(arrays["rewards"]).reshape(num),
        terminated=terminated,
        truncated=cut & ~terminated,
    )
    return data.with_next_observations(_matrix(arrays["next_observations"])) if "next_observations" in arrays else data


def _at_limit(ends: ndarray, limit: int) -> ndarray:
    """Where an episode has had `limit` steps since the last end."""
    starts = np.flatnonzero(np.concatenate([[True], ends[:-1]]))
    since = np.arange(len(ends)) - np.repeat(starts, np.diff(np.append(starts, len(ends))))
    return (since + 1) % limit == 0


def _read_d3rlpy(arrays: Any) -> TransitionDataset:
    names = [name.decode() for name in arrays["columns"][()]]
    if {"observations", "actions", "rewards", "terminated"} - set(names):
        raise DataError(f"a d3rlpy dataset has observations, actions, rewards and terminated; this one has {names}")
    episodes = []
    for i in range(int(arrays["num_episodes"][()])):
        if f"observations_{i}" not in arrays:
            raise DataError(f"episode {i} has observations in several parts; dt_ray trains on one vector per step")
        num = len(arrays[f"rewards_{i}"])
        ended = bool(arrays[f"terminated_{i}"][()])
        last = np.arange(num) == num - 1
        episodes.append(
            TransitionDataset(
                observations=_matrix(arrays[f"observations_{i}"]),
                actions=_matrix(arrays[f"actions_{i}"]),
                rewards=as_vector(arrays[f"rewards_{i}"]).reshape(num),
                terminated=last & ended,
                truncated=last & (not ended),
            )
        )
    return join_episodes(episodes)


def _read_imitation(arrays: Mapping[str, ndarray]) -> TransitionDataset:
    """imitation's `obs` has one row more than `acts` in each trajectory, which `indices` cuts apart."""
    begins = np.concatenate([[0], arrays["indices"]])
    ends = np.append(arrays["indices"], len(arrays["acts"]))
    num = len(arrays["acts"])
    last = np.zeros(num, dtype=bool)
    last[ends - 1] = True
    terminated = last.copy()
    terminated[ends - 1] = arrays["terminal"]
    rows = np.arange(num) + np.repeat(np.arange(len(begins)), ends - begins)
    observations = _matrix(arrays["obs"])
    return TransitionDataset(
        observations=observations[rows],
        actions=_matrix(arrays["acts"]),
        rewards=as_vector(arrays["rews"]),
        terminated=terminated,
        truncated=last & ~terminated,
        starts=begins,
        final_observations=observations[ends + np.arange(len(ends))],
    )


def _any_of(arrays: Mapping[str, ndarray], names: tuple[str, ...], num: int) -> ndarray:
    marks = np.zeros(num, dtype=bool)
    for name in names:
        if name in arrays:
            marks |= np.asarray(arrays[name]).reshape(num).astype(bool)
    return marks


def _matrix(values: Any) -> ndarray:
    values = as_vector(values)
    return values[:, None] if values.ndim == 1 else values

"""Episodes written in the shapes, under the names and in the containers that logs have."""

from __future__ import annotations

import gzip
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from dt_ray.data import TransitionDataset
from dt_ray.data.logs.episodes import to_table

NAMES = {  # vector names, reward, (terminal, cut, done, first): what some libraries call them
    "ours": ("observation", "action", "reward", ("terminated", "truncated", None, None)),
    "gymnasium": ("observations", "actions", "rewards", ("terminations", "truncations", None, None)),
    "d4rl": ("observations", "actions", "rewards", ("terminals", "timeouts", None, None)),
    "tianshou": ("obs", "act", "rew", ("terminated", "truncated", "done", None)),
    "gym": ("Obs", " Action", "Reward ", (None, "TimeLimit.truncated", "done", None)),
    "rlds": ("observation", "action", "reward", ("is_terminal", None, "is_last", "is_first")),
    "old": ("state", "actions", "rewards", ("terminals", None, "dones", "episode_starts")),
}


def ids_of(data: TransitionDataset, kind: str) -> list[Any]:
    """An id for each row."""
    ids = np.repeat(data.episode_ids, data.lengths)
    return {
        "numbers": ids.tolist(),
        "texts": [f"run-{i:03d}" for i in ids],
        "floats": ids.astype(float).tolist(),
        "dates": (np.datetime64("2024-01-01") + ids).tolist(),
    }[kind]


def columns_of(data: TransitionDataset, *, naming: str, ids: str | None, times: str | None) -> dict[str, Any]:
    """The columns of a table or the arrays of a container; an episode without an end has no mark."""
    observation, action, reward, (terminal, cut, done, first) = NAMES[naming]
    columns: dict[str, Any] = {observation: data.observations, action: data.actions, reward: data.rewards}
    columns |= {terminal: data.terminated} if terminal else {}
    columns |= {cut: data.truncated} if cut else {}
    columns |= {done: data.terminated | data.truncated} if done else {}
    if first:
        columns[first] = data.timesteps == 0
    if ids:
        columns["episode_id"] = ids_of(data, ids)
    if times:
        columns["timestep"] = {"index": data.timesteps, "seconds": data.timesteps * 0.05, "every4": 4 * data.timesteps}[
            times
        ]
    return columns


def as_table(columns: dict[str, Any], *, wide: bool = False) -> pa.Table:
    """Vectors as lists, or as a column for each number."""
    made: dict[str, Any] = {}
    for name, values in columns.items():
        if isinstance(values, np.ndarray) and values.ndim == 2:
            if wide:
                made |= {f"{name.strip()}_{i}": values[:, i] for i in range(values.shape[1])}
            else:
                made[name] = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])
        else:
            made[name] = values
    return pa.table(made)


def _csv(separator: str, *, zipped: bool = False) -> Callable[[dict[str, Any], Path], Path]:
    def write(columns: dict[str, Any], file: Path) -> Path:
        file = file.with_suffix(".csv.gz" if zipped else ".csv")
        columns = {
            n: v.astype(np.float64) if getattr(v, "dtype", None) == np.float16 else v for n, v in columns.items()
        }
        options = pyarrow.csv.WriteOptions(delimiter=separator)
        stream = pa.BufferOutputStream()
        pyarrow.csv.write_csv(as_table(columns, wide=True), stream, options)
        content = stream.getvalue().to_pybytes()
        file.write_bytes(gzip.compress(content) if zipped else content)
        return file

    return write


def _parquet(columns: dict[str, Any], file: Path) -> Path:
    pq.write_table(as_table(columns), file.with_suffix(".parquet"))
    return file.with_suffix(".parquet")


def _npz(columns: dict[str, Any], file: Path) -> Path:
    arrays: dict[str, Any] = {name: np.asarray(values) for name, values in columns.items()}
    np.savez(file.with_suffix(".npz"), **arrays)
    return file.with_suffix(".npz")


def _hdf5(columns: dict[str, Any], file: Path) -> Path:
    with h5py.File(file.with_suffix(".hdf5"), "w") as h5:
        for name, values in columns.items():
            array = np.asarray(values)
            h5[name] = array.astype("S") if array.dtype.kind == "U" else array
    return file.with_suffix(".hdf5")


def _pickle(columns: dict[str, Any], file: Path) -> Path:
    arrays = {name: np.asarray(values) for name, values in columns.items()}
    file.with_suffix(".pkl").write_bytes(pickle.dumps(arrays))
    return file.with_suffix(".pkl")


ROW_WRITERS: dict[str, Callable[[dict[str, Any], Path], Path]] = {
    "parquet": _parquet,
    "csv": _csv(","),
    "semicolon": _csv(";"),
    "tab": _csv("\t"),
    "csv.gz": _csv(",", zipped=True),
    "npz": _npz,
    "hdf5": _hdf5,
    "pickle": _pickle,
}


def _episodes(data: TransitionDataset) -> list[dict[str, np.ndarray]]:
    parts = [data.select([i]) for i in range(data.num_episodes)]
    return [
        {
            "observations": part.observations,
            "actions": part.actions,
            "rewards": part.rewards,
            "terminals": part.terminated,
            "timeouts": part.truncated,
        }
        for part in parts
    ]


def write_trajectories(data: TransitionDataset, file: Path) -> Path:
    file.with_suffix(".pkl").write_bytes(pickle.dumps(_episodes(data)))
    return file.with_suffix(".pkl")


def write_dumps(data: TransitionDataset, file: Path) -> Path:
    file.with_suffix(".pkl").write_bytes(b"".join(pickle.dumps([each]) for each in _episodes(data)))
    return file.with_suffix(".pkl")


def write_groups(data: TransitionDataset, file: Path) -> Path:
    with h5py.File(file.with_suffix(".hdf5"), "w") as h5:
        for number, arrays in enumerate(_episodes(data)):
            for name, values in arrays.items():
                h5[f"data/demo_{number}/{name}{'/state' if name == 'observations' else ''}"] = values
    return file.with_suffix(".hdf5")


def write_one_more(data: TransitionDataset, file: Path) -> Path:
    """ManiSkill's habit: a group for each episode, with one observation more than steps."""
    with h5py.File(file.with_suffix(".h5"), "w") as h5:
        for number, arrays in enumerate(_episodes(data)):
            observations = arrays.pop("observations")
            h5[f"traj_{number}/obs"] = np.concatenate([observations, observations[-1:] + 1])
            for name, values in arrays.items():
                h5[f"traj_{number}/{name}"] = values
    return file.with_suffix(".h5")


def write_whole(data: TransitionDataset, file: Path) -> Path:
    pq.write_table(to_table(data), file.with_suffix(".parquet"))
    return file.with_suffix(".parquet")


EPISODE_WRITERS = {
    "trajectories": write_trajectories,
    "dumps": write_dumps,
    "groups": write_groups,
    "one more": write_one_more,
    "whole": write_whole,
}

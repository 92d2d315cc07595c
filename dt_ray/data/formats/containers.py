"""Files of arrays: HDF5 of D4RL, d3rlpy, robomimic and ManiSkill, and NPZ files of imitation and others."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from dt_ray.config.schema import DataConfig
from dt_ray.data.formats.arrays import Arrays, rows_of_parts
from dt_ray.data.logs.files import DatasetFile
from dt_ray.data.logs.names import column_names, has_reward_column
from dt_ray.errors import DataError


def read_hdf5(file: DatasetFile, config: DataConfig) -> pa.Table:
    """D4RL, d3rlpy in either version, or a group for each episode."""
    try:
        import h5py
    except ImportError:
        raise DataError(f"{file.path} is HDF5: pip install 'dt-ray[formats]'") from None
    with file.open() as stream:
        try:
            with h5py.File(stream, "r") as content:
                parts = list(_read_parts(content, config, source=file.path))
        except (DataError, OSError):
            raise
        except Exception as error:  # the library raises other errors for each kind of damage
            raise DataError(f"{file.path} is not a readable HDF5 file: {error}") from None
    return rows_of_parts(parts, config, source=file.path, are_apart=any(place for place, _ in parts))


def _read_parts(content: Any, config: DataConfig, *, source: str) -> Iterator[tuple[str, Arrays]]:
    import h5py

    if "columns" in content and "num_episodes" in content:
        yield from _read_d3rlpy(content, source=source)
        return
    if "episode_0" in content:
        raise DataError(f"{source} is a part of a Minari dataset: give the folder that has data/ in it")
    groups = [content] if _has_rewards(content, config) else list(_episode_groups(content, config))
    for group in groups or [content]:
        names: list[str] = []

        def note(name: str, item: Any, names: list[str] = names) -> None:
            if isinstance(item, h5py.Dataset):
                names.append(name)

        group.visititems(note)
        where = f"{source}, {group.name}" if groups and group is not content else source
        chosen = column_names(names, config.columns, source=where)
        wanted = {name for columns in chosen.values() for name in columns}
        yield ("" if group is content else group.name), {name: group[name][()] for name in names if name in wanted}


def _has_rewards(group: Any, config: DataConfig) -> bool:
    import h5py

    return has_reward_column([name for name, item in group.items() if isinstance(item, h5py.Dataset)], config.columns)


def _episode_groups(group: Any, config: DataConfig) -> Iterator[Any]:
    """The groups below this one that hold rewards, in the order of the numbers in their names."""
    import h5py

    for name in sorted(group, key=lambda name: [int(p) if p.isdigit() else 0 for p in re.split(r"(\d+)", name)]):
        if isinstance(item := group[name], h5py.Group):
            if _has_rewards(item, config):
                yield item
            else:
                yield from _episode_groups(item, config)


def read_npz(file: DatasetFile, config: DataConfig) -> pa.Table:
    """imitation's trajectories, or arrays by their names; arrays of objects that aren't needed are left unread."""
    with file.open() as stream:
        try:
            arrays = np.load(stream, allow_pickle=False)
            if not isinstance(arrays, np.lib.npyio.NpzFile):
                raise DataError(f"{file.path} is no NPZ of plain arrays: it holds one array without a name")
            known = arrays.files
            if {"obs", "acts", "rews", "indices", "terminal"} <= set(known):
                wanted = {"obs", "acts", "rews", "indices", "terminal"}
            else:
                chosen = column_names(known, config.columns, source=file.path)
                wanted = {name for columns in chosen.values() for name in columns}
            named: Arrays = {name: arrays[name] for name in known if name in wanted}
        except (DataError, OSError):
            raise
        except Exception as error:  # NumPy raises other errors for each kind of damage
            raise DataError(f"{file.path} is no NPZ of plain arrays: {error}") from None
    if "indices" in named and "acts" in named:
        return rows_of_parts(list(_cut_imitation(named, source=file.path)), config, source=file.path, are_apart=True)
    return rows_of_parts([("", named)], config, source=file.path)


def _read_d3rlpy(content: Any, *, source: str) -> Iterator[tuple[str, Arrays]]:
    names = [name.decode() for name in content["columns"][()]]
    if {"observations", "actions", "rewards", "terminated"} - set(names):
        raise DataError(
            f"{source}: a d3rlpy dataset has observations, actions, rewards and terminated; this one has {names}"
        )
    for i in range(int(content["num_episodes"][()])):
        if f"observations_{i}" not in content:
            raise DataError(
                f"{source}, episode {i} has observations in several parts; dt_ray trains on one vector per step"
            )
        num = len(content[f"rewards_{i}"])
        ended = np.arange(num) == num - 1
        yield (
            f"episode {i}",
            {
                "observations": content[f"observations_{i}"][()],
                "actions": content[f"actions_{i}"][()],
                "rewards": content[f"rewards_{i}"][()],
                "terminated": ended & bool(content[f"terminated_{i}"][()]),
            },
        )


def _cut_imitation(arrays: Arrays, *, source: str) -> Iterator[tuple[str, Arrays]]:
    """imitation's `obs` has one row more than `acts` in each trajectory, which `indices` cuts apart."""
    num = len(arrays["acts"])
    inner = np.asarray(arrays["indices"]).reshape(-1)
    begins, ends = np.append(0, inner).astype(np.int64), np.append(inner, num).astype(np.int64)
    terminal = np.asarray(arrays["terminal"]).reshape(-1)
    lengths = {"obs": len(arrays["obs"]) - len(begins), "rews": len(arrays["rews"]), "terminal": len(terminal)}
    if lengths != {"obs": num, "rews": num, "terminal": len(begins)} or (ends <= begins).any():
        raise DataError(
            f"{source}: {num} acts in {len(begins)} trajectories need as many rews, {len(begins)} obs more and "
            f"{len(begins)} values of terminal, in rising order; it has {len(arrays['obs'])} obs and {lengths}"
        )
    for number, (begin, end) in enumerate(zip(begins, ends, strict=True)):
        last = np.arange(end - begin) == end - begin - 1
        yield (
            f"trajectory {number}",
            {
                "observations": arrays["obs"][begin + number : end + number + 1],
                "actions": arrays["acts"][begin:end],
                "rewards": arrays["rews"][begin:end],
                "terminated": last & bool(terminal[number]),
            },
        )

"""Files of arrays: HDF5 of D4RL, d3rlpy, robomimic and ManiSkill, and NPZ files of imitation and others."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyarrow as pa

from dt_ray.config.schema import DataConfig
from dt_ray.data.formats.arrays import Arrays, rows_of_parts
from dt_ray.data.formats.lazy_arrays import (
    LazyParts,
    ScannedRows,
    ZippedArray,
    first_rows,
    range_of,
    scan_parts,
    whole,
    zipped_arrays,
)
from dt_ray.data.logs.files import DatasetFile
from dt_ray.data.logs.names import column_names, has_reward_column
from dt_ray.errors import DataError

IMITATION = {"obs", "acts", "rews", "indices", "terminal"}  # the arrays of imitation's trajectories


def read_hdf5(file: DatasetFile, config: DataConfig, *, num_rows: int | None = None) -> pa.Table:
    """D4RL, d3rlpy in either version, or a group for each episode; the first `num_rows` are enough."""
    with _open_hdf5(file, config) as parts:
        chosen = _choose(parts, file, config, num_rows=num_rows)
        are_apart = any(place for place, _ in parts)
    return rows_of_parts(chosen, config, source=file.path, are_apart=are_apart)


def scan_hdf5(file: DatasetFile, config: DataConfig) -> ScannedRows | None:
    """What says where episodes begin; None: the file has to be read whole."""
    with _open_hdf5(file, config) as parts:
        return scan_parts(parts, config, source=file.path, are_apart=any(place for place, _ in parts))


@contextmanager
def _open_hdf5(file: DatasetFile, config: DataConfig) -> Generator[LazyParts]:
    try:
        import h5py
    except ImportError:
        raise DataError(f"{file.path} is HDF5: pip install 'dt-ray[formats]'") from None
    with file.open() as stream:
        try:
            with h5py.File(stream, "r") as content:
                yield list(_find_parts(content, config, source=file.path))
        except (DataError, OSError):
            raise
        except Exception as error:  # the library raises other errors for each kind of damage
            raise DataError(f"{file.path} is not a readable HDF5 file: {error}") from None


def _choose(
    parts: LazyParts, file: DatasetFile, config: DataConfig, *, num_rows: int | None
) -> list[tuple[str, Arrays]]:
    """Those rows that are wanted of a file."""
    if num_rows is not None and file.is_large:
        return first_rows(parts, config, num_rows)
    if (rows := file.rows) is not None:
        return range_of(parts, config, chosen=rows.parts, begin=rows.begin, num_rows=rows.num_rows)
    return whole(parts)


def _find_parts(content: Any, config: DataConfig, *, source: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
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
        yield ("" if group is content else group.name), {name: group[name] for name in names if name in wanted}


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


def read_npz(file: DatasetFile, config: DataConfig, *, num_rows: int | None = None) -> pa.Table:
    """imitation's trajectories, or arrays by their names; arrays of objects that aren't needed are left unread."""
    if file.rows is not None or (num_rows is not None and file.is_large):
        with _open_npz(file, config) as arrays:
            chosen = None if arrays is None else _choose([("", arrays)], file, config, num_rows=num_rows)
        if chosen is not None:
            return rows_of_parts(chosen, config, source=file.path)
    with file.open() as stream:
        try:
            arrays = np.load(stream, allow_pickle=False)
            if not isinstance(arrays, np.lib.npyio.NpzFile):
                raise DataError(f"{file.path} is no NPZ of plain arrays: it holds one array without a name")
            known = arrays.files
            if set(known) >= IMITATION:
                wanted = IMITATION
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


def scan_npz(file: DatasetFile, config: DataConfig) -> ScannedRows | None:
    """What says where episodes begin; None: the file has to be read whole."""
    with _open_npz(file, config) as arrays:
        if arrays is None:
            return None
        for array in arrays.values():
            array.check()
        return scan_parts([("", arrays)], config, source=file.path, are_apart=None)


@contextmanager
def _open_npz(file: DatasetFile, config: DataConfig) -> Generator[dict[str, ZippedArray] | None]:
    """The arrays that a log needs; None: the file, which may be damaged, has to be read whole."""
    with file.open() as stream:
        try:
            with zipped_arrays(stream) as known:
                if set(known) >= IMITATION:
                    yield None
                    return
                names = column_names(list(known), config.columns, source=file.path)
                wanted = {name: known[name] for columns in names.values() for name in columns}
                yield wanted if all(array.has_rows for array in wanted.values()) else None
        except (zipfile.BadZipFile, ValueError, EOFError, NotImplementedError, RuntimeError) as error:
            raise DataError(f"{file.path} is no NPZ of plain arrays: {error}") from None


def _read_d3rlpy(content: Any, *, source: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
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
                "observations": content[f"observations_{i}"],
                "actions": content[f"actions_{i}"],
                "rewards": content[f"rewards_{i}"],
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

"""Arrays by name: HDF5 of D4RL, d3rlpy, robomimic and ManiSkill, and NPZ files of imitation and others.

All of them give rows: one for each step, in columns that are called as the arrays are. What a file keeps apart by
itself (groups, trajectories, a leading axis of episodes) is told apart by the column `UNIT`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy import ndarray

from dt_ray.config import DataConfig
from dt_ray.data.files import DatasetFile
from dt_ray.data.identity import UNIT
from dt_ray.data.names import REQUIRED, SIGNALS, VECTORS, column_names, finds_rewards
from dt_ray.errors import DataError

Arrays = Mapping[str, Any]  # by name


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
        except Exception as error:  # what its library raises depends on what is damaged
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
        group.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)  # noqa: B023
        where = f"{source}, {group.name}" if groups and group is not content else source
        chosen = column_names(names, config.columns, source=where)
        wanted = {name for columns in chosen.values() for name in columns}
        yield ("" if group is content else group.name), {name: group[name][()] for name in names if name in wanted}


def _has_rewards(group: Any, config: DataConfig) -> bool:
    import h5py

    return finds_rewards([name for name, item in group.items() if isinstance(item, h5py.Dataset)], config.columns)


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
            named = {name: arrays[name] for name in known if name in wanted}
        except (DataError, OSError):
            raise
        except Exception as error:  # likewise
            raise DataError(f"{file.path} is no NPZ of plain arrays: {error}") from None
    if "indices" in named and "acts" in named:
        return rows_of_parts(list(_cut_imitation(named, source=file.path)), config, source=file.path, are_apart=True)
    return rows_of_parts([("", named)], config, source=file.path)


def rows_of_parts(
    parts: Sequence[tuple[str, Arrays]], config: DataConfig, *, source: str, are_apart: bool | None = None
) -> pa.Table:
    """The rows of parts that no episode spans, each a place in the file and its arrays; one part may be all episodes.

    Raises:
        DataError: as `align`, no parts, or parts with different arrays.
    """
    aligned = [
        align(arrays, config, source=f"{source}, {place}" if place else source, time_limit=config.time_limit)
        for place, arrays in parts
    ]
    aligned = [each for each in aligned if len(next(iter(each.values())))]
    if not aligned:
        raise DataError(f"{source} is empty: there is no episode in it")
    names = dict.fromkeys(name for each in aligned for name in each)
    columns = {}
    for name in names:
        found = [_part_of(each, name, aligned, source=source) for each in aligned]
        shapes = sorted({values.shape[1:] for values in found})
        if len(shapes) > 1:
            at = next(i for i, values in enumerate(found) if values.shape[1:] != found[0].shape[1:])
            raise DataError(
                f"{source}: {name} has {found[0].shape[1:] or 1} numbers a step in the first part and "
                f"{found[at].shape[1:] or 1} in part {at} ({parts[at][0] or 'of the file'}); all steps need the same"
            )
        columns[name] = found[0] if len(found) == 1 else np.concatenate(found)
    units = columns.pop(UNIT, None)
    if len(parts) > 1 if are_apart is None else are_apart:
        lengths = [len(next(iter(each.values()))) for each in aligned]
        number = np.repeat(np.arange(len(aligned)), lengths)
        units = number if units is None else number * (int(units.max()) + 1) + units
    table = {name: _column(values, f"{source}, {name}") for name, values in columns.items()}
    return pa.table(table | ({} if units is None else {UNIT: units.astype(np.int64)}))


def _part_of(part: Mapping[str, ndarray], name: str, parts: Sequence[Mapping[str, ndarray]], *, source: str) -> ndarray:
    if name in part:
        return part[name]
    num = len(next(iter(part.values())))
    if name == UNIT:
        return np.zeros(num, np.int64)
    if name == "next_observation":  # known where an array has one observation more
        other = next(each[name] for each in parts if name in each)
        return np.full((num, *other.shape[1:]), np.nan, np.float32)
    raise DataError(f"{source}: some parts have no {name}, others have; write it into all, or leave it out of all")


def align(arrays: Arrays, config: DataConfig, *, source: str, time_limit: int | None) -> dict[str, ndarray]:
    """The arrays with one entry for each step, by their names.

    Observations may have one entry more: the last one is the next observation of the last step. Arrays may have a
    leading axis of episodes, and axes of size 1. Starts of episodes may be given as their places.

    Raises:
        DataError: a needed array is missing, or it has another length, holds no numbers, or has more axes.
    """
    names = column_names([name for name in arrays if name != UNIT], config.columns, source=source)
    roles = {column: ours for ours, columns in names.items() for column in columns}
    plain = {column: _plain_array(arrays[column], f"{source}, {column}") for column in roles}
    rewards, actions = plain[names["reward"][0]], plain[names["action"][0]]
    if rewards.ndim == 0:
        raise DataError(f"{source}: {names['reward'][0]} is one number; every step needs its own")
    is_deep = rewards.ndim >= 2 and rewards.shape[1] > 1 and actions.shape[:2] == rewards.shape[:2]
    if is_deep and not _has_two_rewards(plain, names, rewards):
        plain = _unstack(plain, roles, rewards.shape[:2], time_limit, source=source)
    units = plain.pop(UNIT, None)
    num = len(plain[names["reward"][0]])
    result = {}
    for column, values in plain.items():
        if roles[column] == "episode_start" and _are_places(values, num):
            marks = np.zeros(num, bool)
            marks[_checked_places(values, num, f"{source}, {column}")] = True
            plain[column] = values = marks
        if values.ndim == 0:
            raise DataError(f"{source}: {column} is one value; every step needs its own")
    lengths = {column: len(values) for column, values in plain.items()}
    extra = [column for column in names["observation"] if lengths[column] == num + 1]
    wrong = {column for column, length in lengths.items() if length != num and column not in extra}
    if wrong or (extra and len(extra) < len(names["observation"])):
        found = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise DataError(
            f"{source}: arrays of different lengths: {found}; each has one entry for each step, "
            f"observations may have one more"
        )
    for column, values in plain.items():
        result[column] = _shaped(values, roles[column], f"{source}, {column}")
    if extra:
        whole = np.concatenate([_as_matrix(result[column]) for column in names["observation"]], axis=1)
        for column in extra:
            result[column] = result[column][:num]
        if "next_observation" not in names:
            result["next_observation"] = whole[1:]
    return result if units is None else result | {UNIT: units}


def _plain_array(value: Any, where: str) -> ndarray:
    try:
        values = np.asarray(value)
    except ValueError:
        raise DataError(f"{where} holds lists of different lengths; every step needs as many numbers") from None
    if values.dtype == object:
        try:
            values = values.astype(np.float64)
        except (TypeError, ValueError):
            raise DataError(f"{where} holds Python objects; it takes plain arrays of numbers") from None
    if values.dtype.kind not in "biufSUM":
        raise DataError(f"{where} holds {values.dtype}; it takes real numbers")
    return values


def _has_two_rewards(plain: Mapping[str, ndarray], names: Mapping[str, tuple[str, ...]], rewards: ndarray) -> bool:
    """Whether the second axis of the rewards is not time: the observations don't have it."""
    observations = plain[names["observation"][0]]
    return observations.ndim < 2 or observations.shape[1] not in (rewards.shape[1], rewards.shape[1] + 1)


def _unstack(
    plain: Mapping[str, ndarray],
    roles: Mapping[str, str],
    shape: tuple[int, ...],
    time_limit: int | None,
    *,
    source: str,
) -> dict[str, ndarray]:
    """Arrays [episodes, steps, …] as arrays [rows, …] and the number of each row's episode.

    Raises:
        DataError: nothing says that the first axis is that of episodes, and not the second one.
    """
    num_episodes, num_steps = shape
    longer = [n for n, v in plain.items() if roles[n] == "observation" and v.shape[:2] == (num_episodes, num_steps + 1)]
    if not longer and num_episodes > 1 and time_limit != num_steps:
        starts = [
            v.reshape(shape) for n, v in plain.items() if roles[n] == "episode_start" and v.size == np.prod(shape)
        ]
        ends = [v.reshape(shape) for n, v in plain.items() if roles[n] in SIGNALS[:4] and v.size == np.prod(shape)]
        last = np.logical_or.reduce([each.astype(bool) for each in ends]) if ends else np.zeros(shape, bool)
        told = last[:, -1].all() or any(each[:, 0].astype(bool).all() for each in starts)
        if not told:
            raise DataError(
                f"{source}: arrays of {num_episodes} x {num_steps} steps, and no end marks the last step of each of "
                f"the first axis; if each is an episode, set data.time_limit={num_steps}, else write one row "
                f"for each step"
            )
    result: dict[str, ndarray] = {}
    for name, values in plain.items():
        if name in longer:
            result[name] = values[:, :num_steps].reshape(-1, *values.shape[2:])
        elif values.shape[:2] == shape:
            result[name] = values.reshape(-1, *values.shape[2:])
        else:
            raise DataError(f"{source}: {name} has the shape {values.shape}, the rewards {shape}; all need the same")
    if longer and len(longer) == 1 and "next_observation" not in roles.values():
        result["next_observation"] = plain[longer[0]][:, 1:].reshape(-1, *plain[longer[0]].shape[2:])
    result[UNIT] = np.repeat(np.arange(num_episodes), num_steps)
    return result


def _are_places(values: ndarray, num: int) -> bool:
    """Whether starts of episodes are given by their places, and not by a mark for each step."""
    if values.dtype.kind == "b":
        return False
    flat = values.reshape(-1)
    return values.dtype.kind in "iu" and (len(flat) != num or bool(((flat != 0) & (flat != 1)).any()))


def _checked_places(values: ndarray, num: int, where: str) -> ndarray:
    places = values.reshape(-1).astype(np.int64)
    if not len(places) or places[0] != 0 or (np.diff(places) <= 0).any() or places[-1] >= num:
        raise DataError(
            f"{where}: places of starts go up from 0 and stay below the {num} steps, got {places[:8].tolist()}; a mark "
            f"for each step takes true and false"
        )
    return places


def _shaped(values: ndarray, role: str, where: str) -> ndarray:
    """[rows, dimension] or [rows], without the axes of size 1."""
    wide = [size for size in values.shape[1:] if size != 1]
    if len(wide) > (role in VECTORS):
        if role == "reward" or role not in (*REQUIRED, *VECTORS):
            raise DataError(f"{where} has the shape {values.shape}; it takes one value for each step")
        raise DataError(f"{where} has the shape {values.shape}; dt_ray trains on one vector for each step, no images")
    if role in VECTORS:
        flat = values.reshape(len(values), -1) if len(values) else values.reshape(0, *(wide or [1]))
        return flat.astype(np.float32) if flat.dtype.kind == "b" else flat
    return values.reshape(len(values))


def _as_matrix(values: ndarray) -> ndarray:
    return values if values.ndim == 2 else values[:, None]


def _column(values: ndarray, where: str) -> pa.Array:
    if values.dtype.kind in "iuf":
        values = np.ascontiguousarray(values, values.dtype.newbyteorder("="))
        values = values.astype(np.float64) if values.dtype.itemsize > 8 else values
    if values.ndim == 1:
        return pa.array(values)
    if values.dtype.kind not in "iuf":
        raise DataError(f"{where}: expected numbers, found {values.dtype}")
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])


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

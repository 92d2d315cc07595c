"""Turns named arrays into rows, one per step, with a column for each array.

The column `UNIT` numbers the groups, trajectories or entries of a leading axis that rows come from.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy import ndarray

from dt_ray.config.schema import DataConfig
from dt_ray.data.logs.identity import UNIT
from dt_ray.data.logs.names import REQUIRED, SIGNALS, VECTORS, column_names
from dt_ray.errors import DataError

Arrays = Mapping[str, Any]  # by name


def rows_of_parts(
    parts: Sequence[tuple[str, Arrays]],
    config: DataConfig,
    *,
    source: str,
    are_apart: bool | None = None,
    only: Collection[str] | None = None,
) -> pa.Table:
    """The rows of the parts of a file, each given by its place and its arrays. No episode spans two parts.

    Columns besides `only` are checked and left out.

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
    columns: dict[str, ndarray] = {}
    for name in names:
        found = [_part_of(each, name, aligned, source=source) for each in aligned]
        shapes = sorted({values.shape[1:] for values in found})
        if len(shapes) > 1:
            at = next(i for i, values in enumerate(found) if values.shape[1:] != found[0].shape[1:])
            raise DataError(
                f"{source}: {name} has {found[0].shape[1:] or 1} numbers a step in the first part and "
                f"{found[at].shape[1:] or 1} in part {at} ({parts[at][0] or 'of the file'}); all steps need the same"
            )
        if only is None or name in only or name == UNIT:
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
    result: dict[str, ndarray] = {}
    for column, values in plain.items():
        if roles[column] == "episode_start" and are_places(values, num):
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
        matrices = [_as_matrix(result[column]) for column in names["observation"]]
        whole = matrices[0] if len(matrices) == 1 else np.concatenate(matrices, axis=1)
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


def are_places(values: ndarray, num: int) -> bool:
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

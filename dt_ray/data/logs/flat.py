"""Cuts a file's rows, one per step, into fragments of episodes: the steps of one episode in that file.

Where the plan says that an episode continues in other files, `joining.py` joins its fragments.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Int
from numpy import ndarray

from dt_ray.data.logs.ends import Ends, read_ends
from dt_ray.data.logs.episodes import vectors_of
from dt_ray.data.logs.files import RowRange
from dt_ray.data.logs.identity import UNIT, Episodes, Follows, check_steps, group_rows
from dt_ray.data.logs.ids import RowIds, read_ids, read_times
from dt_ray.data.logs.names import ColumnNames
from dt_ray.data.logs.numbering import unique_ids
from dt_ray.data.logs.single_episodes import take_as_one
from dt_ray.data.transitions import TransitionDataset
from dt_ray.errors import DataError


class FoundEpisodes(NamedTuple):
    """The episodes of a file's rows, and what was read to find them."""

    episodes: Episodes
    ends: Ends
    times: ndarray | None
    doubt: str | None  # what looks wrong, for a warning


def find_episodes(
    rows: pa.Table, names: ColumnNames, *, time_limit: int | None, is_one: bool = False, source: str
) -> FoundEpisodes:
    """Which rows are one episode; all of them where `is_one`.

    Raises:
        DataError: no rows, signals that are not understood or contradict one another, or nothing that marks episodes.
    """
    if not len(rows):
        raise DataError(f"{source} is empty: there is no episode in it")
    ends = read_ends(rows, names, source=source)
    times = read_times(rows, names, source=source)
    units = rows[UNIT].to_numpy() if UNIT in rows.column_names else None
    ids = read_ids(rows, names, source=source)
    if is_one:
        return FoundEpisodes(take_as_one(ids, times, ends, units=units, source=source), ends, times, None)
    episodes = group_rows(
        ids,
        times,
        ends,
        units=units,
        follows=_follows(rows, names, source=source),
        time_limit=time_limit,
        source=source,
    )
    doubt = None
    if len(episodes.starts) == 1 < len(rows) and ends.are_logged and not ends.ended.any() and "episode_id" not in names:
        doubt = (
            f"{source}: no step ends an episode, so all {len(rows)} are read as one; if each file is one episode, say "
            f"so by data.episode_per_file=true; else name what tells episodes apart by data.columns.episode_id=NAME, "
            f"or set data.time_limit to their length"
        )
    return FoundEpisodes(episodes, ends, times, doubt)


def _follows(rows: pa.Table, names: ColumnNames, *, source: str) -> Follows | None:
    if "next_observation" not in names or "timestep" in names:
        return None
    if not {*names["observation"], *names["next_observation"]} <= set(rows.column_names):
        return None

    def follows(earlier: ndarray, later: ndarray) -> ndarray:
        after = read_vectors(rows.take(pa.array(earlier)), names, "next_observation", source=source)
        before = read_vectors(rows.take(pa.array(later)), names, "observation", source=source)
        return (after == before).all(axis=1)

    return follows


def read_vectors(rows: pa.Table, names: ColumnNames, name: str, *, source: str) -> ndarray:
    """[rows, dimension] out of the column or columns that `name` means.

    Raises:
        DataError: missing values, no numbers, or vectors of different dimensions.
    """
    columns = [vectors_of(rows[each], f"{source}, {each}") for each in names[name]]
    return columns[0] if len(columns) == 1 else np.concatenate(columns, axis=1)


def _numbers(rows: pa.Table, names: ColumnNames, name: str, *, source: str) -> ndarray:
    """[rows] out of columns that hold one number each; several add up."""
    total = None
    for each in names[name]:
        values = vectors_of(rows[each], f"{source}, {each}")
        if values.shape[1] != 1:
            raise DataError(
                f"{source}, {each} holds {values.shape[1]} numbers a step; a {name.replace('_', '-')} is one number: "
                f"write the one that is meant into a column of its own"
            )
        total = values[:, 0] if total is None else total + values[:, 0]
    assert total is not None
    return total


class Fragments(NamedTuple):
    """The steps of each episode in one file."""

    data: TransitionDataset
    times: ndarray | None  # of the steps, where they are logged
    labels: Mapping[int, str]  # the logged ids of episodes that have others
    doubt: str | None  # what looks wrong, for a warning


def check_found(found: FoundEpisodes, *, joins: bool, source: str) -> None:
    """Raises:
    DataError: an episode goes on after its end, or, where none goes on in another file, steps are missing or repeat.
    """
    episodes, ends, times, _ = found
    last = np.append(episodes.starts[1:], len(ends.terminated)) - 1
    if (end := end_inside(episodes.of(ends.ended), episodes.starts, last)) is not None:
        at, step = end
        raise DataError(
            f"{source}, episode {episodes.label(at)}: it ends at step {step} of this file but goes on with the same "
            f"episode id"
        )
    if times is not None and not joins:
        check_steps(episodes.of(times), episodes.starts, episodes.label, source=f"{source}, ")


def cut_fragments(
    rows: pa.Table,
    names: ColumnNames,
    *,
    ids: Int[ndarray, "E"] | None,
    joins: bool,
    time_limit: int | None,
    is_one: bool = False,
    known: RowRange | None = None,
    source: str,
) -> Fragments:
    """The episodes of one file's rows.

    `ids` are the episode ids of the plan; None: the logged ones, or numbers from 0 where an id repeats. With `joins`
    episodes may continue in other files, so one without an end stays open. Otherwise the end of the log cut it, and its
    last step is marked as truncated. Where `is_one`, the whole file is one episode. Of a range of rows it is `known`
    which are one episode.

    Raises:
        DataError: missing values, vectors of different dimensions, an episode that goes on after its end, or steps
            that are missing or there twice.
    """
    if known is None:
        found = find_episodes(rows, names, time_limit=time_limit, is_one=is_one, source=source)
        check_found(found, joins=joins, source=source)
        ids = unique_ids(found.episodes.ids) if ids is None else ids
        after = None
    else:
        after = None if known.is_last else rows.slice(len(rows) - 1)
        rows = rows.slice(0, int(known.lengths.sum()))
        found = _take_known(rows, names, known, source=source)
        ids = known.ids if ids is None else ids
    data = _steps_of(rows, names, found, ids=ids, joins=joins, source=source)
    if "next_observation" in names:
        data = data.with_next_observations(
            found.episodes.of(_next_observations(rows, names, like=data, source=source)),
            are_single=None if known is None else known.are_single,
            after=None if after is None else read_vectors(after, names, "observation", source=source),
        )
    return Fragments(
        data if joins else data.with_time_limit(time_limit),
        None if found.times is None else found.episodes.of(found.times),
        _labels(ids, found.episodes) if known is None else dict(zip(ids.tolist(), known.logged_ids, strict=True)),
        found.doubt,
    )


def _steps_of(
    rows: pa.Table, names: ColumnNames, found: FoundEpisodes, *, ids: Int[ndarray, "E"], joins: bool, source: str
) -> TransitionDataset:
    episodes, ends = found.episodes, found.ends
    terminated, truncated = episodes.of(ends.terminated), episodes.of(ends.truncated)
    if not joins:
        last = np.append(episodes.starts[1:], len(rows)) - 1
        truncated = truncated.copy()
        truncated[last] |= ~(terminated | truncated)[last]
    return TransitionDataset(
        observations=episodes.of(read_vectors(rows, names, "observation", source=source)),
        actions=episodes.of(read_vectors(rows, names, "action", source=source)),
        rewards=episodes.of(_numbers(rows, names, "reward", source=source)),
        terminated=terminated,
        truncated=truncated,
        starts=episodes.starts,
        episode_ids=ids,
        returns_to_go=episodes.of(_numbers(rows, names, "return_to_go", source=source))
        if "return_to_go" in names
        else None,
    )


def _next_observations(rows: pa.Table, names: ColumnNames, *, like: TransitionDataset, source: str) -> ndarray:
    following = read_vectors(rows, names, "next_observation", source=source)
    if following.shape != like.observations.shape:
        raise DataError(
            f"{source}: observations have {like.observations.shape[1]} dimension(s) and next observations "
            f"{following.shape[1]}; data.columns.next_observation=null leaves them out"
        )
    return following


def _take_known(rows: pa.Table, names: ColumnNames, known: RowRange, *, source: str) -> FoundEpisodes:
    """The episodes that a range of rows is known to hold."""
    starts = np.cumsum(known.lengths) - known.lengths
    labels = RowIds(np.arange(len(starts)), np.asarray(known.logged_ids, object))
    ends, times = read_ends(rows, names, source=source), read_times(rows, names, source=source)
    return FoundEpisodes(Episodes(None, starts, labels.numbers, labels), ends, times, known.doubt)


def _labels(ids: Int[ndarray, "E"], episodes: Episodes) -> dict[int, str]:
    """The logged ids, for messages, where the ids are others."""
    if episodes.labels.texts is None and np.array_equal(ids, episodes.ids):
        return {}
    return {int(number): episodes.label(episode) for episode, number in enumerate(ids)}


def end_inside(ended: Bool[ndarray, "N"], starts: Int[ndarray, "E"], last: Int[ndarray, "E"]) -> tuple[int, int] | None:
    """The first episode with an end before its last row, and the step of that end; None where there is none."""
    inside = np.setdiff1d(np.flatnonzero(ended), last)
    if not len(inside):
        return None
    at = bisect_right(starts, inside[0]) - 1
    return at, int(inside[0] - starts[at])

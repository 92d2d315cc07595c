"""Turns rows, one per step, into episodes.

A file's rows are first cut into fragments: the steps of one episode in that file. Where the plan says that an episode
continues in other files, its fragments are then joined. Neither step needs all of the data at once, so that both run in
one process or over a cluster.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Int
from numpy import ndarray

from dt_ray.data.logs.ends import Ends, read_ends
from dt_ray.data.logs.episodes import from_table, to_table, vectors_of
from dt_ray.data.logs.identity import UNIT, Episodes, Follows, check_steps, group_rows
from dt_ray.data.logs.ids import read_ids, read_times
from dt_ray.data.logs.names import ColumnNames
from dt_ray.data.logs.numbering import unique_ids
from dt_ray.data.logs.single_episodes import take_as_one
from dt_ray.data.transitions import STEP_FIELDS, TransitionDataset
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


def cut_fragments(
    rows: pa.Table,
    names: ColumnNames,
    *,
    ids: Int[ndarray, "E"] | None,
    joins: bool,
    time_limit: int | None,
    is_one: bool = False,
    source: str,
) -> Fragments:
    """The episodes of one file's rows.

    `ids` are the episode ids of the plan; None: the logged ones, or numbers from 0 where an id repeats. With `joins`
    episodes may continue in other files, so one without an end stays open. Otherwise the end of the log cut it, and its
    last step is marked as truncated. Where `is_one`, the whole file is one episode.

    Raises:
        DataError: missing values, vectors of different dimensions, an episode that goes on after its end, or steps
            that are missing or there twice.
    """
    found, ends, times, doubt = find_episodes(rows, names, time_limit=time_limit, is_one=is_one, source=source)
    starts = found.starts
    if ids is None:
        ids = unique_ids(found.ids)
    last = np.append(starts[1:], len(rows)) - 1
    terminated, truncated = found.of(ends.terminated), found.of(ends.truncated)
    ended = terminated | truncated
    if (end := _end_inside(ended, starts, last)) is not None:
        at, step = end
        raise DataError(
            f"{source}, episode {found.label(at)}: it ends at step {step} of this file but goes on with the same "
            f"episode id"
        )
    ordered = None if times is None else found.of(times)
    if ordered is not None and not joins:
        check_steps(ordered, starts, found.label, source=f"{source}, ")
    if not joins:
        truncated = truncated.copy()
        truncated[last] |= ~ended[last]
    data = TransitionDataset(
        observations=found.of(read_vectors(rows, names, "observation", source=source)),
        actions=found.of(read_vectors(rows, names, "action", source=source)),
        rewards=found.of(_numbers(rows, names, "reward", source=source)),
        terminated=terminated,
        truncated=truncated,
        starts=starts,
        episode_ids=ids,
        returns_to_go=found.of(_numbers(rows, names, "return_to_go", source=source))
        if "return_to_go" in names
        else None,
    )
    if "next_observation" in names:
        following = found.of(read_vectors(rows, names, "next_observation", source=source))
        if following.shape != data.observations.shape:
            raise DataError(
                f"{source}: observations have {data.observations.shape[1]} dimension(s) and next observations "
                f"{following.shape[1]}; data.columns.next_observation=null leaves them out"
            )
        data = data.with_next_observations(following)
    labels = {}  # the logged ids, for messages, where the ids are others
    if found.labels.texts is not None or not np.array_equal(ids, found.ids):
        labels = {int(number): found.label(episode) for episode, number in enumerate(ids)}
    return Fragments(data if joins else data.with_time_limit(time_limit), ordered, labels, doubt)


def _end_inside(
    ended: Bool[ndarray, "N"], starts: Int[ndarray, "E"], last: Int[ndarray, "E"]
) -> tuple[int, int] | None:
    """The first episode with an end before its last row, and the step of that end; None where there is none."""
    inside = np.setdiff1d(np.flatnonzero(ended), last)
    if not len(inside):
        return None
    at = bisect_right(starts, inside[0]) - 1
    return at, int(inside[0] - starts[at])


def fragment_table(fragments: Fragments, *, file_index: int) -> pa.Table:
    """Fragments as a table for `join_fragments`: that of `to_table`, and the columns `file_index` and `timesteps`."""
    data, times = fragments.data, fragments.times
    table = to_table(data).append_column("file_index", pa.array(np.full(data.num_episodes, file_index)))
    offsets = pa.array(np.append(data.starts, data.num_transitions).astype(np.int32))
    steps = pa.array(np.full(data.num_transitions, np.nan) if times is None else times)
    return table.append_column("timesteps", pa.ListArray.from_arrays(offsets, steps))


def join_fragments(
    fragments: pa.Table, *, time_limit: int | None = None, labels: Mapping[int, str] | None = None
) -> TransitionDataset:
    """Joins fragments that together hold whole episodes.

    An episode with no end of either kind is `truncated`: the log stopped, the environment did not. So is one that
    ends at `time_limit`, whatever the log says.

    Raises:
        DataError: an episode goes on after its end, or its timesteps have gaps or repeat.
    """
    data = from_table(fragments.drop_columns(["file_index", "timesteps"]), source="joining fragments")
    times = fragments["timesteps"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    order = np.lexsort((fragments["file_index"].to_numpy(), times[data.starts], data.episode_ids))
    rows = _rows_of(data, order)
    data, times = data.select(order), times[rows]
    heads = np.flatnonzero(np.append(True, np.diff(data.episode_ids) != 0))
    tails = np.append(heads[1:], data.num_episodes) - 1
    starts, ids = data.starts[heads], data.episode_ids[heads]
    finals = data.final_observations
    fragment = np.repeat(np.arange(data.num_episodes), data.lengths)
    episode = np.repeat(np.arange(len(heads)), np.diff(np.append(starts, data.num_transitions)))
    if ((np.diff(times) < 0) & (np.diff(episode) == 0)).any():  # the steps of an episode lie mixed over files
        by_time = np.lexsort((times, episode))
        fragment, times, data = fragment[by_time], times[by_time], _with_steps(data, by_time)

    def label(index: int) -> str:
        return (labels or {}).get(int(ids[index]), f"{ids[index]}")

    last = data.ends[tails] - 1
    ended = data.terminated | data.truncated
    if (end := _end_inside(ended, starts, last)) is not None:
        raise DataError(
            f"episode {label(end[0])} ends in one file and goes on in a later one; if each file has episodes of its "
            f"own, set data.episodes_across_files=false"
        )
    known = ~np.isnan(times)
    if known.all():
        check_steps(times, starts, label, source="")
    truncated = data.truncated.copy()
    truncated[last] |= ~ended[last]
    return TransitionDataset(
        observations=data.observations,
        actions=data.actions,
        rewards=data.rewards,
        terminated=data.terminated,
        truncated=truncated,
        starts=starts,
        episode_ids=ids,
        returns_to_go=data.returns_to_go,
        final_observations=None if finals is None else finals[fragment[last]],
    ).with_time_limit(time_limit)


def _with_steps(data: TransitionDataset, rows: Int[ndarray, "N"]) -> TransitionDataset:
    """The same episodes with their steps in another order."""
    to_go = data.returns_to_go
    return replace(
        data,
        **{name: getattr(data, name)[rows] for name in STEP_FIELDS},
        returns_to_go=None if to_go is None else to_go[rows],
    )


def _rows_of(data: TransitionDataset, episodes: ndarray) -> ndarray:
    """The rows of these episodes, in this order."""
    lengths = data.lengths[episodes]
    offsets = np.repeat(data.starts[episodes] - np.concatenate([[0], np.cumsum(lengths)[:-1]]), lengths)
    return np.arange(int(lengths.sum())) + offsets

"""Joins the fragments of episodes that lie in several files; not all of the data is needed at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pyarrow as pa
from jaxtyping import Int
from numpy import ndarray

from dt_ray.data.logs.episodes import from_table, to_table
from dt_ray.data.logs.flat import Fragments, end_inside
from dt_ray.data.logs.identity import check_steps
from dt_ray.data.transitions import STEP_FIELDS, TransitionDataset
from dt_ray.errors import DataError


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
    if (end := end_inside(ended, starts, last)) is not None:
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

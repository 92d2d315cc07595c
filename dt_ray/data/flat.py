"""Flat transitions, a row per step, into episodes, a row each.

A file is first cut into fragments (the rows that one episode has in that file); fragments of the same episode are then
joined. Both steps see a part of the data only, so that they run anywhere: in one process or over a cluster.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pyarrow as pa
from numpy import ndarray

from dt_ray.data.episodes import from_table, to_table, vectors_of
from dt_ray.data.transitions import TransitionDataset
from dt_ray.errors import DataError

REQUIRED = ("observation", "action", "reward")
OPTIONAL = ("episode_id", "timestep", "terminated", "truncated", "next_observation")


def column_names(available: list[str], renamed: Mapping[str, str], *, source: str) -> dict[str, str]:
    """Our name -> the file's name, for the columns that the file has.

    Raises:
        DataError: unknown names in `renamed`, a needed column that is not there, or nothing that marks episodes.
    """
    unknown = set(renamed) - {*REQUIRED, *OPTIONAL}
    if unknown:
        raise DataError(
            f"data.columns names {', '.join(sorted(unknown))}; it maps {', '.join((*REQUIRED, *OPTIONAL))} "
            f"to the names in the file"
        )
    names = {name: renamed.get(name, name) for name in (*REQUIRED, *OPTIONAL)}
    missing = [
        ours for ours, theirs in names.items() if (ours in REQUIRED or ours in renamed) and theirs not in available
    ]
    if missing:
        example = " ".join(f"data.columns.{name}=NAME" for name in missing)
        raise DataError(
            f"{source}: no column for {', '.join(missing)} among {', '.join(available)}; name it with {example}"
        )
    names = {ours: theirs for ours, theirs in names.items() if theirs in available}
    if not names.keys() & {"episode_id", "terminated", "truncated"}:
        raise DataError(
            f"{source}: nothing marks where episodes end among {', '.join(available)}; "
            f"name it with data.columns.episode_id=NAME, data.columns.terminated=NAME or data.columns.truncated=NAME"
        )
    return names


def count_ends(table: pa.Table, names: Mapping[str, str]) -> int:
    """Episodes that end in this file, for logs without episode ids: they are numbered by the ends before them."""
    return int(_ends(table, names).sum())


def cut_fragments(
    table: pa.Table, names: Mapping[str, str], *, file_index: int, num_ends_before: int, source: str
) -> pa.Table:
    """The episode table of one file's rows, with the columns `file_index` and (if logged) `timesteps` besides.

    `num_ends_before` counts the episodes that end in the files before this one.

    Raises:
        DataError: missing values, vectors of different dimensions, or an episode that goes on after its end.
    """
    if "episode_id" in names:
        ids = table[names["episode_id"]]
        if ids.null_count or not pa.types.is_integer(ids.type):
            raise DataError(f"{source}: {names['episode_id']} must be a whole number at every step, found {ids.type}")
        episode = ids.to_numpy().astype(np.int64)
    else:
        ends_before = np.cumsum(_ends(table, names))
        episode = num_ends_before + np.concatenate([[0], ends_before[:-1]]) if len(table) else ends_before
    # Stable: without timesteps, the rows of an episode keep their order.
    order = np.lexsort((table[names["timestep"]].to_numpy(), episode) if "timestep" in names else (episode,))
    episode_ids, starts = np.unique(episode[order], return_index=True)

    def vectors(name: str) -> ndarray:
        return vectors_of(table[names[name]], f"{source}, {names[name]}")[order]

    last = np.append(starts[1:], len(table)) - 1
    fragments = to_table(
        TransitionDataset(
            observations=vectors("observation"),
            actions=vectors("action"),
            rewards=vectors("reward")[:, 0],
            starts=starts,
            episode_ids=episode_ids,
            final_observations=vectors("next_observation")[last] if "next_observation" in names else None,
            **{name: _flag(table, names, name)[order] for name in ("terminated", "truncated")},
        )
    )
    inside = np.setdiff1d(np.flatnonzero(_ends(table, names)[order]), last)
    if len(inside):
        at = np.searchsorted(starts, inside[0], side="right") - 1
        raise DataError(
            f"{source}, episode {episode_ids[at]}: it ends at step {inside[0] - starts[at]} of this file but goes on "
            f"with the same episode id"
        )
    fragments = fragments.append_column("file_index", pa.array(np.full(len(episode_ids), file_index)))
    if "timestep" in names:
        offsets = pa.array(np.append(starts, len(table)).astype(np.int32))
        steps = pa.array(table[names["timestep"]].to_numpy()[order].astype(np.int64))
        fragments = fragments.append_column("timesteps", pa.ListArray.from_arrays(offsets, steps))
    return fragments


def join_fragments(fragments: pa.Table) -> pa.Table:
    """The episode table of fragments that hold whole episodes between them.

    An episode with no end of either kind is `truncated`: the log stopped, the environment did not.

    Raises:
        DataError: an episode goes on after its end, or its timesteps have gaps or repeat.
    """
    data = from_table(fragments.drop_columns(_extra(fragments)), source="joining fragments")
    if "timesteps" in fragments.column_names:
        first = fragments["timesteps"].combine_chunks().flatten().to_numpy()[data.starts]
        order = np.lexsort((first, data.episode_ids))
        _check_timesteps(fragments.take(pa.array(order)))
    else:
        order = np.lexsort((fragments["file_index"].to_numpy(), data.episode_ids))
    data = data.select(order)
    heads = np.flatnonzero(np.append(True, np.diff(data.episode_ids) != 0))
    tails = np.append(heads[1:], data.num_episodes) - 1
    last = data.ends[tails] - 1
    ended = data.terminated | data.truncated
    inside = np.setdiff1d(np.flatnonzero(ended), last)
    if len(inside):
        at = np.searchsorted(data.starts, inside[0], side="right") - 1
        raise DataError(f"episode {data.episode_ids[at]} ends in one file and goes on in a later one")
    truncated = data.truncated.copy()
    truncated[last] |= ~ended[last]
    return to_table(
        TransitionDataset(
            observations=data.observations,
            actions=data.actions,
            rewards=data.rewards,
            terminated=data.terminated,
            truncated=truncated,
            starts=data.starts[heads],
            episode_ids=data.episode_ids[heads],
            final_observations=None if data.final_observations is None else data.final_observations[tails],
        )
    )


def _extra(fragments: pa.Table) -> list[str]:
    return [name for name in ("file_index", "timesteps") if name in fragments.column_names]


def _check_timesteps(fragments: pa.Table) -> None:
    """Each episode must count its steps without a gap, from wherever it starts."""
    lists = fragments["timesteps"].combine_chunks()
    episode = np.repeat(fragments["episode_id"].to_numpy(), lists.value_lengths().to_numpy(zero_copy_only=False))
    steps = lists.flatten().to_numpy()
    wrong = np.flatnonzero((np.diff(episode) == 0) & (np.diff(steps) != 1))
    if len(wrong):
        at = wrong[0]
        raise DataError(
            f"episode {episode[at]}: timestep {steps[at]} is followed by {steps[at + 1]}; "
            f"a step is missing or twice there"
        )


def _ends(table: pa.Table, names: Mapping[str, str]) -> ndarray:
    return _flag(table, names, "terminated") | _flag(table, names, "truncated")


def _flag(table: pa.Table, names: Mapping[str, str], name: str) -> ndarray:
    if name not in names:
        return np.zeros(len(table), dtype=bool)
    return table[names[name]].cast(pa.bool_()).fill_null(False).to_numpy()

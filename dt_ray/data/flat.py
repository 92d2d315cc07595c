"""Flat transitions, a row per step, into episodes, a row each.

A file is first cut into fragments (the rows that one episode has in that file); fragments of the same episode are then
joined. Both steps see a part of the data only, so that they run anywhere: in one process or over a cluster.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from hashlib import blake2b

import numpy as np
import pyarrow as pa
from jaxtyping import Int
from numpy import ndarray

from dt_ray.data.episodes import from_table, to_table, vectors_of
from dt_ray.data.transitions import SOURCE_BITS, TransitionDataset
from dt_ray.errors import DataError

REQUIRED = ("observation", "action", "reward")
OPTIONAL = ("episode_id", "timestep", "terminated", "truncated", "next_observation", "return_to_go")
USUAL_NAMES = {  # besides ours: RLlib's, LeRobot's, D4RL's
    "observation": ("observations", "obs", "state", "observation.state"),
    "action": ("actions",),
    "reward": ("rewards", "next.reward"),
    "episode_id": ("eps_id", "episode_index", "episode"),
    "timestep": ("t", "frame_index"),
    "terminated": ("terminateds", "terminals", "terminal", "dones", "done", "next.done"),
    "truncated": ("truncateds", "truncations", "timeouts", "timeout"),
    "next_observation": ("next_observations", "new_obs", "next_obs"),
    "return_to_go": ("returns_to_go", "rtg"),
}

ColumnNames = Mapping[str, tuple[str, ...]]  # our name -> the column of the file, or the columns of a vector's numbers


def column_names(available: Sequence[str], renamed: Mapping[str, str], *, source: str) -> ColumnNames:
    """Our names and the file's, for the columns that the file has.

    A column that isn't renamed is found under our name or a usual one, or as numbered columns (`observation_0`, …).

    Raises:
        DataError: unknown names in `renamed`, a needed column that is not there, or nothing that marks episodes.
    """
    unknown = set(renamed) - {*REQUIRED, *OPTIONAL}
    if unknown:
        raise DataError(
            f"data.columns names {', '.join(sorted(unknown))}; it maps {', '.join((*REQUIRED, *OPTIONAL))} "
            f"to the names in the file"
        )
    names = {
        name: tuple(part.strip() for part in renamed[name].split(",")) if name in renamed else _find(name, available)
        for name in (*REQUIRED, *OPTIONAL)
    }
    missing = [
        ours
        for ours, theirs in names.items()
        if (ours in REQUIRED or ours in renamed) and (not theirs or set(theirs) - set(available))
    ]
    if missing:
        example = " ".join(f"data.columns.{name}=NAME" for name in missing)
        why = "; without rewards there is no return to reach, and nothing to train on" if missing == ["reward"] else ""
        raise DataError(
            f"{source}: no column for {', '.join(missing)} among {', '.join(available)}; name it with {example}{why}"
        )
    names = {ours: theirs for ours, theirs in names.items() if theirs}
    if not names.keys() & {"episode_id", "terminated", "truncated"}:
        raise DataError(
            f"{source}: nothing marks where episodes end among {', '.join(available)}; "
            f"name it with data.columns.episode_id=NAME, data.columns.terminated=NAME or data.columns.truncated=NAME"
        )
    return names


def _find(name: str, available: Sequence[str]) -> tuple[str, ...]:
    for usual in (name, *USUAL_NAMES[name]):
        if usual in available:
            return (usual,)
        numbered = {
            int(match[1]): each for each in available if (match := re.fullmatch(rf"{usual}[_.\[](\d+)\]?", each))
        }
        if numbered and sorted(numbered) == list(range(len(numbered))):
            return tuple(numbered[i] for i in range(len(numbered)))
    return ()


def count_ends(table: pa.Table, names: ColumnNames) -> int:
    """Episodes that end in this file, for logs without episode ids: they are numbered by the ends before them."""
    return int(_ends(table, names).sum())


def episodes_of_rows(table: pa.Table, names: ColumnNames, *, num_ends_before: int, source: str) -> Int[ndarray, "N"]:
    """The id of each row's episode: the logged one, or the number of ends before it.

    Raises:
        DataError: a missing id, or one that is neither a whole number nor a text.
    """
    if "episode_id" in names:
        return _episode_ids(table[names["episode_id"][0]], f"{source}, {names['episode_id'][0]}")
    ends_before = np.cumsum(_ends(table, names))
    return num_ends_before + np.concatenate([[0], ends_before[:-1]]) if len(table) else ends_before


def cut_fragments(
    table: pa.Table, names: ColumnNames, *, file_index: int, num_ends_before: int, source: str
) -> pa.Table:
    """The episode table of one file's rows, with the columns `file_index` and (if logged) `timesteps` besides.

    `num_ends_before` counts the episodes that end in the files before this one.

    Raises:
        DataError: missing values, vectors of different dimensions, or an episode that goes on after its end.
    """
    episode = episodes_of_rows(table, names, num_ends_before=num_ends_before, source=source)
    # Stable: without timesteps, the rows of an episode keep their order.
    order = np.lexsort((table[names["timestep"][0]].to_numpy(), episode) if "timestep" in names else (episode,))
    episode_ids, starts = np.unique(episode[order], return_index=True)

    def vectors(name: str) -> ndarray:
        columns = [vectors_of(table[each], f"{source}, {each}") for each in names[name]]
        return np.concatenate(columns, axis=1)[order]

    last = np.append(starts[1:], len(table)) - 1
    data = TransitionDataset(
        observations=vectors("observation"),
        actions=vectors("action"),
        rewards=vectors("reward")[:, 0],
        starts=starts,
        episode_ids=episode_ids,
        returns_to_go=vectors("return_to_go")[:, 0] if "return_to_go" in names else None,
        **{name: _flag(table, names, name)[order] for name in ("terminated", "truncated")},
    )
    if "next_observation" in names:
        data = data.with_next_observations(vectors("next_observation"))
    fragments = to_table(data)
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
        steps = pa.array(table[names["timestep"][0]].to_numpy()[order].astype(np.int64))
        fragments = fragments.append_column("timesteps", pa.ListArray.from_arrays(offsets, steps))
    return fragments


def join_fragments(fragments: pa.Table, *, time_limit: int | None = None) -> pa.Table:
    """The episode table of fragments that hold whole episodes between them.

    An episode with no end of either kind is `truncated`: the log stopped, the environment did not. So is one that
    ends at `time_limit`, whatever the log says.

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
            returns_to_go=data.returns_to_go,
            final_observations=None if data.final_observations is None else data.final_observations[tails],
        ).with_time_limit(time_limit)
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


def _episode_ids(column: pa.ChunkedArray, where: str) -> ndarray:
    """Whole numbers as they are; texts as numbers that are the same in every file."""
    if column.null_count or not (pa.types.is_integer(column.type) or pa.types.is_string(column.type)):
        raise DataError(f"{where} must be a whole number or a text at every step, found {column.type}")
    if pa.types.is_integer(column.type):
        return column.to_numpy().astype(np.int64)
    encoded = column.combine_chunks().dictionary_encode()
    numbers = [
        int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little") >> (64 - SOURCE_BITS)
        for text in encoded.dictionary.to_pylist()
    ]
    return np.asarray(numbers, np.int64)[encoded.indices.to_numpy()]


def _ends(table: pa.Table, names: ColumnNames) -> ndarray:
    return _flag(table, names, "terminated") | _flag(table, names, "truncated")


def _flag(table: pa.Table, names: ColumnNames, name: str) -> ndarray:
    if name not in names:
        return np.zeros(len(table), dtype=bool)
    return table[names[name][0]].cast(pa.bool_()).fill_null(False).to_numpy()

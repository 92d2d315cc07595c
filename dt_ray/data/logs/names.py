"""The meaning of a log's columns, by the names that people give them; no other file knows these names."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence

from dt_ray.errors import DataError

VECTORS = ("observation", "action", "next_observation")
SIGNALS = ("terminated", "truncated", "done", "episode_end", "episode_start", "step_type")  # all columns of each count
REQUIRED = ("observation", "action", "reward")
OPTIONAL = ("episode_id", "timestep", *SIGNALS, "next_observation", "return_to_go")
USUAL_NAMES = {  # besides ours: Gymnasium's, Stable-Baselines', CleanRL's, Tianshou's, RLlib's, RLDS', D4RL's, …
    "observation": ("observations", "obs", "state", "states", "observation.state"),
    "action": ("actions", "act", "acts"),
    "reward": ("rewards", "rew", "rews", "next.reward"),
    "episode_id": ("eps_id", "episode_index", "episode", "episode_ids", "episode_idx", "ep_id", "ep", "trajectory_id",
                   "traj_id", "trajectory", "traj"),
    "timestep": ("t", "frame_index", "timesteps", "time_step", "step", "step_index", "step_id", "episode_step"),
    "terminated": ("terminateds", "terminals", "terminal", "terminations", "termination", "is_terminal",
                   "next.terminated"),
    "truncated": ("truncateds", "truncations", "truncation", "timeouts", "timeout", "is_truncated", "is_timeout",
                  "timelimit.truncated", "next.truncated"),
    "done": ("dones", "is_done", "next.done", "episode_done"),
    "episode_end": ("episode_ends", "episode_terminals", "is_last", "last"),
    "episode_start": ("episode_starts", "is_first", "first"),
    "step_type": ("step_types",),
    "next_observation": ("next_observations", "new_obs", "next_obs", "obs_next", "next_state", "next_states"),
    "return_to_go": ("returns_to_go", "rtg"),
}  # fmt: skip
MAX_LISTED = 30  # names in a message

ColumnNames = Mapping[str, tuple[str, ...]]  # our name -> the columns of the file that it means


def column_names(available: Sequence[str], renamed: Mapping[str, str | None], *, source: str) -> ColumnNames:
    """Our names and the file's, for the columns that the file has.

    A column that isn't renamed is found under our name or a usual one, whatever its case; a vector also as numbered
    columns (`observation_0`, …) or as the one array of a group. One that is renamed to nothing is left out.

    Raises:
        DataError: unknown names in `renamed`, a needed column that is missing, or several columns where one is allowed.
    """
    if unknown := set(renamed) - {*REQUIRED, *OPTIONAL}:
        raise DataError(
            f"data.columns names {', '.join(sorted(unknown))}; it maps {', '.join((*REQUIRED, *OPTIONAL))} "
            f"to the names in the file"
        )
    given = {
        ours: tuple(_exact(part.strip(), available) for part in theirs.split(",")) if theirs else ()
        for ours, theirs in renamed.items()
    }
    taken = {name for names in given.values() for name in names}
    names = {
        ours: given[ours]
        if ours in given
        else _usual_columns(ours, [name for name in available if name not in taken], source)
        for ours in (*REQUIRED, *OPTIONAL)
    }
    missing = [
        ours
        for ours, theirs in names.items()
        if (ours in REQUIRED and not theirs) or (ours in given and set(theirs) - set(available))
    ]
    if missing:
        gone = [name for ours in missing for name in given.get(ours, ()) if name not in available]
        close = {name: difflib.get_close_matches(name, list(available), n=1) for name in gone}
        guesses = "".join(f"; did you mean {found[0]} for {name}?" for name, found in close.items() if found)
        named = f" ({', '.join(gone)}: not there)" if gone else ""
        example = " ".join(f"data.columns.{name}=NAME" for name in missing)
        why = "; without rewards there is no return to reach, and nothing to train on" if missing == ["reward"] else ""
        raise DataError(
            f"{source}: no column for {', '.join(missing)}{named} among {listed(available)}{guesses}; name it with "
            f"{example}{why}"
        )
    wanted = {name for theirs in names.values() for name in theirs}
    if twice := sorted({name for name in wanted if list(available).count(name) > 1}):
        raise DataError(f"{source}: several columns are called {', '.join(twice)}; give each its own name")
    for ours in ("timestep", "return_to_go"):
        if len(names[ours]) > 1:
            raise DataError(f"{source}: data.columns.{ours} takes one column, got {', '.join(names[ours])}")
    return {ours: theirs for ours, theirs in names.items() if theirs}


def has_reward_column(available: Iterable[str], renamed: Mapping[str, str | None]) -> bool:
    """Whether a column of rewards is among these."""
    names = list(available)
    return any(name in names for name in (renamed.get("reward") or "").split(",")) or bool(
        _usual_columns("reward", names, "")
    )


def listed(names: Iterable[str]) -> str:
    """The names, or the first of many."""
    names = list(names)
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return ", ".join(names[:MAX_LISTED]) + more


def _exact(name: str, available: Sequence[str]) -> str:
    """The file's spelling of a name."""
    return name if name in available else next((each for each in available if _plain(each) == _plain(name)), name)


def _usual_columns(ours: str, available: Sequence[str], source: str) -> tuple[str, ...]:
    plain: dict[str, str] = {}  # names without case and blanks -> the file's
    for name in available:
        plain.setdefault(_plain(name), name)
    usual = (ours, *USUAL_NAMES[ours])
    if ours in SIGNALS:
        return tuple(plain[name] for name in usual if name in plain)
    for name in usual:
        if name in plain:
            return (plain[name],)
        if ours in VECTORS and (numbered := _numbered(name, plain)):
            return numbered
    if ours not in VECTORS:
        return ()
    for name in usual:
        parts = [theirs for each, theirs in plain.items() if re.match(rf"{re.escape(name)}[/.]", each)]
        if len(parts) > 1 and ours in REQUIRED:
            raise DataError(
                f"{source}: {name} has several parts, {listed(parts)}; choose by data.columns.{ours}={','.join(parts)}"
            )
        if parts:
            return (parts[0],) if len(parts) == 1 else ()
    return ()


def _numbered(name: str, plain: Mapping[str, str]) -> tuple[str, ...]:
    found = {
        int(match[1]): theirs
        for each, theirs in plain.items()
        if (match := re.fullmatch(rf"{re.escape(name)}[_.\[/ ]?(\d+)\]?", each))
    }
    first = min(found, default=0)
    whole = first <= 1 and sorted(found) == list(range(first, first + len(found)))
    return tuple(found[i] for i in sorted(found)) if whole else ()


def _plain(name: str) -> str:
    return name.strip().strip("\ufeff").strip().casefold()

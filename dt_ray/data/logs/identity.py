"""Groups the rows of a file into episodes by ids, ends, starts and timesteps; refuses rows where these leave it open.

Legend: N rows, E episodes.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray

from dt_ray.data.logs.ends import Ends
from dt_ray.data.logs.ids import RowIds
from dt_ray.errors import DataError

# The column with the number of the group, trajectory or array that a row is from: no episode spans two.
UNIT = "dt_ray.unit"
EVENNESS = 1e-3  # of a clock's step, within which its steps are the same
REMEDY = "name the steps by data.columns.timestep=NAME or the ends by data.columns.terminated=NAME"


class Follows(Protocol):
    """Whether the next observation of each row in `earlier` equals the observation of the row in `later`."""

    def __call__(self, earlier: Int[ndarray, "M"], later: Int[ndarray, "M"]) -> Bool[ndarray, "M"]: ...


class Episodes(NamedTuple):
    """The episodes of a file. With the rows in `order`, the rows of each episode follow one another."""

    order: Int[ndarray, "N"] | None  # None: as they are
    starts: Int[ndarray, "E"]
    ids: Int[ndarray, "E"]
    labels: RowIds

    def label(self, episode: int) -> str:
        return self.labels.label(self.ids[episode])

    def of(self, values: ndarray) -> ndarray:
        """A column's values in `order`."""
        return values if self.order is None else values[self.order]


def group_rows(
    ids: RowIds | None,
    times: Float[ndarray, "N"] | None,
    ends: Ends,
    *,
    units: Int[ndarray, "N"] | None,
    follows: Follows | None,
    time_limit: int | None,
    source: str,
) -> Episodes:
    """The episodes of a file with at least one row.

    `follows` says whether the logged next observation of a row is the observation of another, where both are logged.

    Raises:
        DataError: an id comes back and nothing says whether its episode does, signals contradict one another, or
            nothing says where episodes end.
    """
    if ids is None:
        return _group_in_order(times, ends, units=units, time_limit=time_limit, source=source)
    key = ids.numbers
    if units is not None:  # the same id in another part of the container is another episode
        _, key = np.unique(np.stack([units, ids.numbers], axis=1), axis=0, return_inverse=True)
        key = key.reshape(-1)
    found = _group_by_key(key, ids, times, ends, source=source, follows=follows)
    _check_marks(found, ends, source=source)
    return found


def _group_in_order(
    times: ndarray | None, ends: Ends, *, units: ndarray | None, time_limit: int | None, source: str
) -> Episodes:
    num = len(ends.terminated)
    is_other_part = np.zeros(num - 1, bool) if units is None else np.diff(units) != 0
    first = np.ones(num, bool)
    first[1:] = ends.ended[:-1] | is_other_part
    if ends.starts is not None:
        missing = np.flatnonzero(first[1:] & ~is_other_part & ~ends.starts[1:])
        if len(missing):
            raise DataError(
                f"{source}: row {missing[0]} ends an episode and row {missing[0] + 1} is not marked as the start of one"
            )
        first |= ends.starts
    restarts = False
    if times is not None:
        back = np.flatnonzero((np.diff(times) < 0) & ~first[1:]) + 1
        origins = times[:1] if units is None else times[np.searchsorted(units, units[back])]
        if len(wrong := back[times[back] != origins]):
            raise DataError(
                f"{source}: timestep {times[wrong[0] - 1]:g} is followed by {times[wrong[0]]:g} in row {wrong[0]}, and "
                f"no ids say of which episode; name them by data.columns.episode_id=NAME, or ignore the timesteps by "
                f"data.columns.timestep=null"
            )
        restarts = len(back) > 0
        first[back] = True
    known = ends.are_logged or ends.starts is not None or units is not None or restarts
    if not known and time_limit is None:
        raise DataError(
            f"{source}: nothing says where episodes end; if each file is one episode, set data.episode_per_file=true "
            f"(--episode-per-file); if a column says it, name it by data.columns.episode_id=NAME, "
            f"data.columns.terminated=NAME or data.columns.truncated=NAME; if all have the same length, set "
            f"data.time_limit"
        )
    if time_limit is not None and units is None:
        starts = np.flatnonzero(first)
        since = np.arange(num) - np.repeat(starts, np.diff(np.append(starts, num)))
        first |= (since > 0) & (since % time_limit == 0)
    starts = np.flatnonzero(first)
    ids = np.arange(len(starts))
    return Episodes(None, starts, ids, RowIds(ids, None))


def _group_by_key(
    key: ndarray, ids: RowIds, times: ndarray | None, ends: Ends, *, source: str, follows: Follows | None
) -> Episodes:
    num = len(key)
    change = np.flatnonzero(np.diff(key)) + 1
    heads = np.concatenate([[0], change])  # of runs of one key
    ended = ends.ended
    ordered = times is None or bool(((np.diff(times) >= 0) | (np.diff(key) != 0)).all())
    sorted_runs = bool((np.diff(key[heads]) > 0).all())
    inside = ended[:-1] & (np.diff(key) == 0)
    if ordered and sorted_runs and not inside.any():
        return Episodes(None, heads, ids.numbers[heads], ids)

    order = np.lexsort((key,) if times is None else (times, key))
    by_key = key[order]
    firsts = np.concatenate([[0], np.flatnonzero(np.diff(by_key)) + 1])
    lengths = np.diff(np.append(firsts, num))
    is_head = np.zeros(num, np.int64)
    is_head[heads] = 1
    num_runs = np.add.reduceat(is_head[order], firsts)
    not_last = np.ones(num, bool)
    not_last[firsts + lengths - 1] = False
    ends_inside = np.logical_or.reduceat(ended[order] & not_last, firsts)
    even, repeats = _are_steps_even(times, order, firsts, lengths)
    if times is not None and repeats.any():  # time that goes back to where it was is not that of a shuffled table
        back = np.flatnonzero((np.diff(times) < 0) & (np.diff(key) == 0))
        repeats &= np.isin(by_key[firsts], key[back])
    whole = ~ends_inside & (even | ((num_runs == 1) & ~repeats))
    if whole.all():
        return Episodes(order, firsts, ids.numbers[order[firsts]], ids)

    is_whole = np.repeat(whole, lengths)
    in_order = np.argsort(key, kind="stable")  # the rows of each key as they stand in the file
    pieces = np.zeros(num, np.int64)  # by row of the file, for keys of several episodes
    rows = in_order[~is_whole]
    pieces[rows] = _cut_pieces(rows, key, ids, times, ended, source=source, follows=follows)
    place = np.zeros(num) if times is None else times.copy()
    place[rows] = 0  # as they stand
    order = np.lexsort((place, pieces, key))
    new = (np.diff(key[order]) != 0) | (np.diff(pieces[order]) != 0)
    firsts = np.concatenate([[0], np.flatnonzero(new) + 1])
    return Episodes(order, firsts, ids.numbers[order[firsts]], ids)


def _are_steps_even(
    times: ndarray | None, order: ndarray, firsts: ndarray, lengths: ndarray
) -> tuple[Bool[ndarray, "E"], Bool[ndarray, "E"]]:
    """For each key: whether its sorted times increase by equal steps, and whether a time occurs twice."""
    if times is None:
        return lengths == 1, np.zeros(len(firsts), bool)
    steps = np.diff(times[order], append=np.nan)
    steps[firsts + lengths - 1] = np.nan  # to the next key
    low, high = np.fmin.reduceat(steps, firsts), np.fmax.reduceat(steps, firsts)
    low[lengths == 1] = high[lengths == 1] = 1
    return (low > 0) & (high - low <= EVENNESS * low), low == 0


def _cut_pieces(
    rows: ndarray,
    key: ndarray,
    ids: RowIds,
    times: ndarray | None,
    ended: ndarray,
    *,
    source: str,
    follows: Follows | None,
) -> ndarray:
    """For each row, the number of its episode among those with the same key; rows are sorted by key, stably.

    Raises:
        DataError: it isn't known whether an id that comes back is the same episode.
    """
    keys = key[rows]
    same = np.diff(keys) == 0
    apart = np.diff(rows) != 1  # other rows stand between them
    after_end = ended[rows[:-1]]
    begins = np.concatenate([[0], np.flatnonzero(~same) + 1])
    origin = np.full(len(rows), np.nan)
    if times is not None:
        lengths = np.diff(np.append(begins, len(rows)))
        origin = np.repeat(np.minimum.reduceat(times[rows], begins), lengths)
    again = np.zeros(len(rows) - 1, bool)
    if times is not None:
        again = (times[rows[1:]] == origin[1:]) & (times[rows[1:]] <= times[rows[:-1]])
    new = same & ((after_end & (apart | again)) | (apart & again))
    if len(wrong := np.flatnonzero(same & after_end & ~new)):
        at = wrong[0]
        begin = begins[np.searchsorted(begins, at, side="right") - 1]
        raise DataError(
            f"{source}, episode {ids.of_row(rows[at])}: it ends at step {at - begin} of this file but goes "
            f"on with the same episode id"
        )
    pieces = np.cumsum(np.concatenate([[False], new | ~same]))
    returns = np.flatnonzero(same & apart & ~new)  # rows before which other episodes' rows stand
    if len(returns):
        tails = np.append(np.flatnonzero(np.diff(pieces)), len(rows) - 1)
        closes = ended[rows[tails]][pieces[returns]]  # by an end of its own, later
        restarted = bool((same & apart & new).any())
        shown = closes & (not restarted)
        if follows is not None:
            shown |= follows(rows[returns], rows[returns + 1])
        if times is not None:
            shown |= times[rows[returns + 1]] - times[rows[returns]] == 1
        if not shown.all():
            at = returns[np.argmin(shown)]
            raise DataError(
                f"{source}: the id of episode {ids.of_row(rows[at])} comes back in row {rows[at + 1]} "
                f"after other episodes, and nothing says whether it goes on or is another one; {REMEDY}, or give "
                f"each its own id"
            )
    if times is not None:
        inside = np.flatnonzero((np.diff(pieces) == 0) & (times[rows[1:]] < times[rows[:-1]]))
        if len(inside):
            at = inside[0]
            raise DataError(
                f"{source}, episode {ids.of_row(rows[at])}: timestep {times[rows[at]]:g} is followed by "
                f"{times[rows[at + 1]]:g}; a step is missing or twice there, or data.columns.timestep=null ignores it"
            )
    return pieces


def _check_marks(episodes: Episodes, ends: Ends, *, source: str) -> None:
    """Raises:
    DataError: a start is marked inside an episode, or one that begins in the middle of the file is not marked.
    """
    if ends.starts is None:
        return
    marks = episodes.of(ends.starts)
    heads = np.zeros(len(marks), bool)
    heads[episodes.starts] = True
    rows = np.arange(len(marks)) if episodes.order is None else episodes.order
    wrong = (marks & ~heads) | (~marks & heads & (rows != 0))
    if wrong.any():
        at = int(np.argmax(wrong))
        episode = int(np.searchsorted(episodes.starts, at, side="right")) - 1
        what = "is marked as a start" if marks[at] else "is not marked as a start"
        raise DataError(
            f"{source}, episode {episodes.label(episode)}: step {at - episodes.starts[episode]} {what}, against the "
            f"ids; leave one of them out by data.columns.episode_start=null or data.columns.episode_id=null"
        )


def check_steps(times: Float[ndarray, "N"], starts: Int[ndarray, "E"], label: object, *, source: str) -> None:
    """Refuses timesteps with a gap or a repetition; a clock, which doesn't count by one, is let pass.

    Raises:
        DataError: the episode and its steps are named.
    """
    steps = np.diff(times)
    steps[starts[1:] - 1] = np.nan
    steps_inside = steps[~np.isnan(steps)]
    if not len(steps_inside):
        return
    share = (steps_inside == 1).mean()
    counts = share > 0 and bool((times == np.round(times)).all())
    if counts and share <= 0.5:  # by one more often than by anything else, but for rows that are there twice
        found, nums = np.unique(steps_inside[steps_inside != 0], return_counts=True)
        counts = found[nums.argmax()] == 1
    wrong = np.flatnonzero((steps != 1) & ~np.isnan(steps)) if counts else np.flatnonzero(steps < 0)
    if len(wrong):
        at = int(wrong[0])
        episode = int(np.searchsorted(starts, at, side="right")) - 1
        name = label(episode) if callable(label) else label
        raise DataError(
            f"{source}episode {name}: timestep {times[at]:g} is followed by {times[at + 1]:g}; "
            f"a step is missing or twice there; data.columns.timestep=null ignores the column"
        )

"""Divides large files into ranges of rows, so that no task holds a whole file.

Where episodes begin is found as in a file that is read whole, by the columns that say so, of which all rows are read. A
range then is rows that follow one another and hold whole episodes. What can't be divided so is read whole: files in
which rows of different episodes are mixed, quoted or zipped CSV, arrays with a leading axis of episodes.

Legend: E episodes, N rows, C rows at which a range may begin.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
from jaxtyping import Int
from numpy import ndarray

from dt_ray.config.schema import DataConfig
from dt_ray.data.formats import scan_rows
from dt_ray.data.formats.lazy_arrays import ScannedRows
from dt_ray.data.logs.files import PART_BYTES, DatasetFile, RowRange
from dt_ray.data.logs.flat import check_found, find_episodes
from dt_ray.data.logs.identity import Episodes
from dt_ray.data.logs.numbering import own_ids, unique_ids
from dt_ray.data.logs.plan import FilePlan
from dt_ray.errors import DataError

FORMATS = ("hdf5", "npz", "csv")  # that are read by ranges
RANGE_BYTES = PART_BYTES // 2  # of a range, in memory: several copies are held while it is read


def find_ranges(file: DatasetFile, config: DataConfig) -> list[RowRange] | None:
    """The ranges of a large file, in the order of its rows; None: it is read whole, which also says what is wrong."""
    try:
        scanned = scan_rows(file, config)
        if scanned is None or not len(scanned.rows):
            return None
        found = find_episodes(scanned.rows, scanned.names, time_limit=config.time_limit, source=file.path)
        check_found(found, joins=False, source=file.path)
    except DataError:
        return None
    episodes = found.episodes
    num = len(scanned.rows)
    lengths = np.diff(np.append(episodes.starts, num))
    if (firsts := _first_rows(episodes, lengths)) is None:
        return None
    if episodes.order is not None and "next_observation" in scanned.names:
        return None  # the reset after an episode is looked for in the one with the next id
    by_row = np.argsort(firsts)
    edges = _edges(scanned, firsts[by_row], num)
    if len(edges) < 3:
        return None
    ids = own_ids(unique_ids(episodes.ids), file, config)
    places = np.split(by_row, np.searchsorted(firsts[by_row], edges[1:-1]))
    return [
        _placed(
            RowRange(
                begin=begin,
                episodes=chosen,
                lengths=lengths[chosen],
                ids=ids[chosen],
                logged_ids=[episodes.label(at) for at in chosen],
                is_last=end == num,
                are_single=bool((lengths == 1).all()),
                doubt=found.doubt if begin == 0 else None,
            ),
            scanned,
        )
        for (begin, end), chosen in zip(pairwise(edges), places, strict=True)
    ]


def _first_rows(episodes: Episodes, lengths: Int[ndarray, "E"]) -> Int[ndarray, "E"] | None:
    """The row at which each episode begins; None where the rows of one do not follow one another."""
    if episodes.order is None:
        return episodes.starts
    steps = np.diff(episodes.order)
    steps[episodes.starts[1:] - 1] = 1
    return episodes.order[episodes.starts] if (steps == 1).all() else None


def _edges(scanned: ScannedRows, starts: Int[ndarray, "E"], num_rows: int) -> list[int]:
    """The rows at which ranges begin, and the number of all rows."""
    allowed = starts
    if scanned.part_begins is not None:
        allowed = np.intersect1d(starts, scanned.part_begins)
    allowed = np.append(allowed, num_rows)
    target = max(1, int(RANGE_BYTES / max(scanned.row_bytes, 1)))
    edges = [0]
    while edges[-1] < num_rows:
        at = int(np.searchsorted(allowed, edges[-1] + target, side="right")) - 1
        if allowed[at] <= edges[-1]:
            at = int(np.searchsorted(allowed, edges[-1], side="right"))
        edges.append(int(allowed[at]))
    return edges


def _placed(rows: RowRange, scanned: ScannedRows) -> RowRange:
    """The same with the place of its rows in the file."""
    end = rows.begin + rows.num_rows
    if (parts := scanned.part_begins) is not None:
        own_end = rows.begin + int(rows.lengths.sum())
        return replace(rows, parts=range(*np.searchsorted(parts, [rows.begin, own_end]).tolist()))
    if scanned.blocks is None:
        return rows
    bytes_at, rows_at = zip(*scanned.blocks, strict=True)
    first = int(np.searchsorted(rows_at, rows.begin, side="right")) - 1
    last = int(np.searchsorted(rows_at, end))
    text = (bytes_at[first], bytes_at[last], rows.begin - rows_at[first])
    return replace(rows, text=text, schema=scanned.schema)


def divided(
    files: Sequence[DatasetFile],
    config: DataConfig,
    ranges_of: Callable[[Sequence[DatasetFile]], Iterable[Sequence[RowRange] | None]],
) -> list[DatasetFile]:
    """The files, and in the place of a large one that `ranges_of` divides, a file for each of its ranges."""
    large = [at for at, file in enumerate(files) if may_have_ranges(file, config)]
    found = dict(zip(large, ranges_of([files[at] for at in large]) if large else (), strict=True))
    parts: list[DatasetFile] = []
    for at, file in enumerate(files):
        ranges = found.get(at)
        num_rows = sum(each.num_rows for each in ranges or ())
        parts += (
            [file]
            if ranges is None
            else [replace(file, rows=each, size=file.size * each.num_rows // num_rows) for each in ranges]
        )
    return parts


def may_have_ranges(file: DatasetFile, config: DataConfig) -> bool:
    return file.is_large and file.format in FORMATS and not config.episode_per_file and file.rows is None


def divided_plans(plans: Sequence[FilePlan | None], files: Sequence[DatasetFile]) -> list[FilePlan | None]:
    """The plans of whole files as those of these files, which are ranges of them or whole."""
    result: list[FilePlan | None] = []
    whole, plan = iter(plans), None
    for file in files:
        if file.rows is None or file.rows.begin == 0:
            plan = next(whole)
        if plan is None or file.rows is None:
            result.append(plan)
        else:
            result.append(plan._replace(ids=plan.ids[file.rows.episodes]))
    return result

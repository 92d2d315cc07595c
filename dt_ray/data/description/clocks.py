"""The times of a log's steps, and the ids that its files give to their episodes.

Legend: E episodes of a file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Int
from numpy import ndarray

from dt_ray.config.schema import DataConfig
from dt_ray.data.formats import has_rows, read_rows
from dt_ray.data.formats.tables import read_parquet
from dt_ray.data.logs.columns import plain_array
from dt_ray.data.logs.episodes import episode_ids_of
from dt_ray.data.logs.files import DatasetFile
from dt_ray.data.logs.flat import find_episodes
from dt_ray.data.logs.names import SIGNALS
from dt_ray.data.logs.numbering import FILE_BITS

GAP = 3.0  # an interval that is so many times longer than the usual one of its file is a gap
MAX_GAPS = 50  # kept of a file: the longest ones
UNITS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}  # seconds


@dataclass(frozen=True, kw_only=True)
class Gap:
    """A wait between two steps of an episode that is longer than the file's usual one."""

    path: str
    episode: str  # as it is logged
    step: int  # the step before it, counted within the episode in this file
    interval: float
    usual: float


@dataclass(frozen=True, kw_only=True)
class FileClock:
    """Facts from a file's columns of ids and times; times are in seconds where the column's type says so."""

    path: str
    labels: Sequence[int | str]  # of its episodes
    are_logged: bool  # the labels; otherwise they are numbers from 0
    num_ended: int | None = None  # episodes with a logged end of any kind; None: not read here
    column: str | None = None  # None: no times
    is_in_seconds: bool = False
    counts_steps: bool = False  # the column counts steps and is no clock
    usual: float = np.nan  # interval between steps
    quick: float = np.nan  # a twentieth of the intervals are shorter
    slow: float = np.nan  # a twentieth are longer
    num_gaps: int = 0
    gaps: tuple[Gap, ...] = ()


def read_clock(file: DatasetFile, config: DataConfig) -> FileClock | None:
    """Reads the columns of ids, times and ends of one file; None for formats that have no ids.

    Raises:
        DataError: as `dt_ray.data.logs.reading.read_fragments`.
    """
    if not has_rows(file):
        if file.format != "parquet":
            return None
        ids = episode_ids_of(read_parquet(file, ["episode_id"]), source=file.path)
        return FileClock(path=file.path, labels=ids.tolist(), are_logged=True)
    rows, names = read_rows(file, config, ["episode_id", "timestep", *SIGNALS])
    found, ends, times, _ = find_episodes(
        rows, names, time_limit=config.time_limit, is_one=config.episode_per_file, source=file.path
    )
    num = len(rows)
    labels = [found.label(i) if found.labels.texts is not None else int(found.ids[i]) for i in range(len(found.starts))]
    last = np.append(found.starts[1:], num) - 1
    clock = FileClock(
        path=file.path,
        labels=labels,
        are_logged="episode_id" in names and not config.episode_per_file,
        num_ended=int(found.of(ends.ended)[last].sum()),
    )
    if times is None:
        return clock
    (column,) = names["timestep"]
    seconds = _seconds(plain_array(rows[column]).type)
    ordered = found.of(times) * (seconds or 1.0)
    clock = replace(clock, column=column, is_in_seconds=seconds is not None)
    intervals = np.diff(ordered)
    intervals[found.starts[1:] - 1] = np.nan
    inside = intervals[np.isfinite(intervals)]
    if not len(inside):
        return clock
    usual = float(np.median(inside))
    long_ones = np.flatnonzero(np.nan_to_num(intervals) > GAP * max(usual, 0.0)) if usual > 0 else np.zeros(0, int)
    longest = long_ones[np.argsort(-intervals[long_ones], kind="stable")][:MAX_GAPS]
    quick, slow = np.quantile(inside, [0.05, 0.95])
    return replace(
        clock,
        counts_steps=seconds is None and usual == 1 and bool((ordered == np.round(ordered)).all()),
        usual=usual,
        quick=float(quick),
        slow=float(slow),
        num_gaps=len(long_ones),
        gaps=tuple(_gap(int(at), intervals, found.starts, labels, usual, file.path) for at in longest),
    )


def _gap(
    at: int,
    intervals: Float[ndarray, "N"],
    starts: Int[ndarray, "E"],
    labels: Sequence[int | str],
    usual: float,
    path: str,
) -> Gap:
    episode = int(np.searchsorted(starts, at, side="right")) - 1
    return Gap(
        path=path,
        episode=f"{labels[episode]}",
        step=at - int(starts[episode]),
        interval=float(intervals[at]),
        usual=usual,
    )


def _seconds(kind: pa.DataType) -> float | None:
    """The unit of a column of times in seconds; None where its type has no unit."""
    if pa.types.is_timestamp(kind) or pa.types.is_time(kind) or pa.types.is_duration(kind):
        return UNITS[kind.unit]
    if pa.types.is_date(kind):
        return 86_400.0 if pa.types.is_date32(kind) else 1e-3
    return None


def name_episodes(
    ids: Int[ndarray, "E"], files: Sequence[DatasetFile], clocks: Sequence[FileClock | None]
) -> list[tuple[str, str | None]]:
    """The logged id of each of these episodes, and the path of its file, or None where that isn't known.

    It inverts the numbering of `dt_ray.data.logs.plan`.
    """
    known = [clock for clock in clocks if clock is not None]
    if len(known) < len(files):
        return [(f"{number}", files[0].path if len(files) == 1 else None) for number in ids]
    labels = [label for clock in known for label in clock.labels]
    paths = [clock.path for clock in known for _ in clock.labels]
    are_logged = all(clock.are_logged for clock in known)
    if are_logged and len(set(labels)) == len(labels):
        owner = dict(zip(labels, paths, strict=True))
        sorted_texts = sorted(each for each in labels if isinstance(each, str))
        has_texts = len(sorted_texts) == len(labels)
        names: list[int | str] = [sorted_texts[number] if has_texts else int(number) for number in ids]
        return [(f"{name}", owner.get(name)) for name in names]
    if len(files) == 1 or not are_logged:
        return [(f"{labels[number] if are_logged else number}", paths[number]) for number in ids]
    found: list[tuple[str, str | None]] = []
    for number in ids:
        clock, within = known[int(number) >> FILE_BITS], int(number) & (2**FILE_BITS - 1)
        is_number = isinstance(clock.labels[0], int)
        found.append((f"{within if is_number else clock.labels[within]}", clock.path))
    return found

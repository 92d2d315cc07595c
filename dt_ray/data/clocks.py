"""When the steps of a log were taken, by the column that says so, and what its files call their episodes.

Legend: E episodes of a file.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Int
from numpy import ndarray

from dt_ray.config.schema import DataConfig
from dt_ray.data.columns import plain_array
from dt_ray.data.files import DatasetFile
from dt_ray.data.flat import find_episodes
from dt_ray.data.formats import has_rows, read_rows
from dt_ray.data.names import SIGNALS
from dt_ray.data.plan import FILE_BITS

GAP = 3.0  # times the usual interval of the file: a longer one is a gap
MAX_GAPS = 50  # of a file that are kept, the longest
UNITS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}  # seconds


@dataclass(frozen=True, kw_only=True)
class Gap:
    """A wait between two steps of an episode that is longer than the file's usual one."""

    path: str
    episode: str  # as it is logged
    step: int  # of the episode in this file, after which it is
    interval: float
    usual: float


@dataclass(frozen=True, kw_only=True)
class FileClock:
    """What a file's column of times says, in seconds where it is known to count them."""

    path: str
    labels: Sequence[int | str]  # of its episodes
    are_logged: bool  # the labels; else they are counted
    num_ended: int  # episodes with a logged end of any kind
    column: str | None = None  # None: no times
    is_in_seconds: bool = False
    counts_steps: bool = False  # an index and no clock
    usual: float = np.nan  # interval between steps
    quick: float = np.nan  # a twentieth of the intervals are shorter
    slow: float = np.nan  # a twentieth are longer
    num_gaps: int = 0
    gaps: tuple[Gap, ...] = ()


def read_clock(file: DatasetFile, config: DataConfig) -> FileClock | None:
    """Reads the columns of ids, times and ends of one file; None: it has whole episodes, which have no times.

    Raises:
        DataError: as `data.reading.read_file`.
    """
    if not has_rows(file):
        return None
    rows, names = read_rows(file, config, ["episode_id", "timestep", *SIGNALS])
    found, ends, times, _ = find_episodes(rows, names, time_limit=config.time_limit, source=file.path)
    num = len(rows)
    labels = [found.label(i) if found.labels.texts is not None else int(found.ids[i]) for i in range(len(found.starts))]
    last = np.append(found.starts[1:], num) - 1
    facts = {
        "path": file.path,
        "labels": labels,
        "are_logged": "episode_id" in names,
        "num_ended": int(found.of(ends.ended)[last].sum()),
    }
    if times is None:
        return FileClock(**facts)
    (column,) = names["timestep"]
    seconds = _seconds(plain_array(rows[column]).type)
    ordered = found.of(times) * (seconds or 1.0)
    intervals = np.diff(ordered)
    intervals[found.starts[1:] - 1] = np.nan
    inside = intervals[np.isfinite(intervals)]
    if not len(inside):
        return FileClock(**facts, column=column, is_in_seconds=seconds is not None)
    usual = float(np.median(inside))
    long_ones = np.flatnonzero(np.nan_to_num(intervals) > GAP * max(usual, 0.0)) if usual > 0 else np.zeros(0, int)
    longest = long_ones[np.argsort(-intervals[long_ones], kind="stable")][:MAX_GAPS]
    quick, slow = np.quantile(inside, [0.05, 0.95])
    return FileClock(
        **facts,
        column=column,
        is_in_seconds=seconds is not None,
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
    """How many seconds one of the column's units is; None: it does not say."""
    if pa.types.is_timestamp(kind) or pa.types.is_time(kind) or pa.types.is_duration(kind):
        return UNITS[kind.unit]
    if pa.types.is_date(kind):
        return 86_400.0 if pa.types.is_date32(kind) else 1e-3
    return None


def name_episodes(
    ids: Int[ndarray, "E"], files: Sequence[DatasetFile], clocks: Iterable[FileClock | None]
) -> list[tuple[str, str | None]]:
    """What the log calls each of these episodes, and the path of the file that it is in; None: in several, or unknown."""
    known = list(clocks)
    all_labels = [label for clock in known if clock is not None for label in clock.labels]
    are_unique = len(set(all_labels)) == len(all_labels)
    are_texts = bool(all_labels) and all(isinstance(label, str) for label in all_labels)
    ranked = sorted(map(str, all_labels)) if are_texts and are_unique else None
    owner = {label: clock.path for clock in known if clock is not None for label in clock.labels} if are_unique else {}
    offsets = np.cumsum([0, *(0 if clock is None else len(clock.labels) for clock in known)])
    are_logged = all(clock is not None and clock.are_logged for clock in known)
    return [_name(int(number), files, known, ranked, owner, offsets if not are_logged else None) for number in ids]


def _name(
    number: int,
    files: Sequence[DatasetFile],
    clocks: Sequence[FileClock | None],
    ranked: Sequence[str] | None,
    owner: dict[int | str, str],
    offsets: ndarray | None,
) -> tuple[str, str | None]:
    place, within = number >> FILE_BITS, number & (2**FILE_BITS - 1)
    if 0 < place < len(files) or (len(files) > 1 and 0 <= number < 2**FILE_BITS and not owner and offsets is None):
        clock = clocks[place] if place < len(clocks) else None
        texts = clock is not None and bool(clock.labels) and isinstance(clock.labels[0], str)
        label = sorted(map(str, clock.labels))[within] if texts and clock is not None else f"{within}"
        return label, files[place].path
    if len(files) == 1:
        return (ranked[number] if ranked is not None and number < len(ranked) else f"{number}"), files[0].path
    if ranked is not None and number < len(ranked):
        return ranked[number], owner.get(ranked[number])
    if offsets is not None and 0 <= number < offsets[-1]:
        return f"{number}", files[int(np.searchsorted(offsets, number, side="right")) - 1].path
    return f"{number}", owner.get(number)

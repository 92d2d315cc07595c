"""Files that are one episode each, because the user says so: nothing in them may say otherwise.

Legend: N rows.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from dt_ray.data.logs.ends import Ends
from dt_ray.data.logs.identity import Episodes
from dt_ray.data.logs.ids import RowIds
from dt_ray.errors import DataError


def take_as_one(
    ids: RowIds | None,
    times: Float[ndarray, "N"] | None,
    ends: Ends,
    *,
    units: Int[ndarray, "N"] | None,
    source: str,
) -> Episodes:
    """All rows of a file as one episode, in the order of their timesteps where these are logged.

    Raises:
        DataError: ids, ends, starts, timesteps or the container itself say that there are several.
    """
    num = len(ends.terminated)
    goes_back = times is not None and bool((np.diff(times) < 0).any())
    order = np.argsort(times, kind="stable") if times is not None and goes_back else None
    if (other := _other_episode(ids, times if goes_back else None, ends, order, units)) is not None:
        raise DataError(
            f"{source}: data.episode_per_file says that the file is one episode, but {other}; leave out the setting "
            f"(--episode-per-file), or the column that is wrong by data.columns.NAME=null"
        )
    labels = RowIds(np.zeros(num, np.int64), None) if ids is None else ids
    return Episodes(order, np.zeros(1, np.int64), labels.numbers[:1], labels)


def _other_episode(
    ids: RowIds | None, times: ndarray | None, ends: Ends, order: ndarray | None, units: ndarray | None
) -> str | None:
    """What says that the rows are several episodes; `times` are given where they go back somewhere."""
    rows = np.arange(len(ends.terminated)) if order is None else order
    if units is not None and (units != units[0]).any():
        return f"it has {len(np.unique(units))} parts, each with episodes of its own"
    if ids is not None and (other := np.flatnonzero(ids.numbers != ids.numbers[0])).size:
        return f"row 0 has the episode id {ids.of_row(0)} and row {other[0]} the id {ids.of_row(other[0])}"
    if times is not None and len(np.unique(times)) < len(times):
        back = int(np.argmax(np.diff(times) < 0))
        return f"its timesteps start again: {times[back]:g} is followed by {times[back + 1]:g} in row {back + 1}"
    if (inside := rows[:-1][ends.ended[rows[:-1]]]).size:
        return f"row {inside[0]} ends an episode and more rows follow"
    if ends.starts is not None and (inside := rows[1:][ends.starts[rows[1:]]]).size:
        return f"row {inside[0]} is marked as the start of an episode"
    return None

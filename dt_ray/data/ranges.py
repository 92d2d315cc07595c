"""Problems with the size of a log's numbers: values that float32 can't tell apart, rewards that vanish in a sum,
actions that use a small part of their bounds.

Legend: E episodes, S observation, A action dimension, D either.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from dt_ray.data.spaces import SpaceSpec
from dt_ray.data.transitions import TransitionDataset

FEWEST_VALUES = 256  # float32 must have so many between the smallest and the largest number of a column
SMALLEST_CHANGE = 2  # steps of float32; smaller changes from row to row can't be told from rounding
NUM_LOOKED_AT = 4096  # first rows of a log, by which usual changes are estimated
ROWS_SIDE_BY_SIDE = 64
SMALLEST_DEVIATION = 1e-6  # below it a column counts as constant and is not normalised
SWALLOWED = 1e7  # a float32 sum loses rewards that are so many times smaller than the largest one
UNUSED = 1e-3  # of the bounds' width: a policy can't act as finely as a smaller range of actions needs


@dataclass(frozen=True, kw_only=True)
class Ranges:
    """The smallest and largest observations and actions of episodes, and the sizes of their rewards."""

    observations: Float[ndarray, "2 S"]
    actions: Float[ndarray, "2 A"]
    changes: Float[ndarray, "S"]  # median change between rows; infinite for constants and whole numbers
    largest_reward: Float[ndarray, "E"]  # its size
    usual_reward: Float[ndarray, "E"]  # mean size of the other rewards that are not 0; 0 where there is none

    @classmethod
    def of(cls, data: TransitionDataset) -> Ranges:
        sizes = np.abs(data.rewards.astype(np.float64))
        largest = np.maximum.reduceat(sizes, data.starts)
        others = (sizes > 0) & (sizes < np.repeat(largest, data.lengths))
        num_others = np.add.reduceat(others.astype(np.int64), data.starts)
        return cls(
            observations=_extremes(data.observations),
            actions=_extremes(data.actions),
            changes=np.array([_usual_change(column) for column in data.observations[:NUM_LOOKED_AT].T]),
            largest_reward=largest,
            usual_reward=np.add.reduceat(sizes * others, data.starts) / np.maximum(num_others, 1),
        )

    def joined(self, other: Ranges) -> Ranges:
        """Of the episodes of both."""
        pairs = {name: np.stack([getattr(self, name), getattr(other, name)]) for name in ("observations", "actions")}
        extremes = {name: np.stack([each[:, 0].min(axis=0), each[:, 1].max(axis=0)]) for name, each in pairs.items()}
        rewards = {
            name: np.concatenate([getattr(self, name), getattr(other, name)])
            for name in ("largest_reward", "usual_reward")
        }
        return Ranges(**extremes, **rewards, changes=self.changes)


def range_traps(
    ranges: Ranges, spec: SpaceSpec | None = None, columns: Mapping[str, str | None] | None = None
) -> Iterator[str]:
    """One line for each such problem, with what mends it; `columns` is `data.columns`."""
    for kind in ("observation", "action"):
        low, high = getattr(ranges, f"{kind}s")
        is_observation = kind == "observation"
        for i in range(len(low)):
            change = float(ranges.changes[i]) if is_observation else np.inf
            problem = _precision_problem(float(low[i]), float(high[i]), change=change, is_normalised=is_observation)
            if problem is not None:
                yield f"{column_name(kind, i, len(low), columns)} {problem}"
    yield from _reward_size_traps(ranges)
    if spec is not None:
        yield from _unused_bound_traps(ranges, spec, columns)


def constant_columns(ranges: Ranges, columns: Mapping[str, str | None] | None = None) -> list[str]:
    """The observations and actions that are the same at every step, by name."""
    return [
        column_name(kind, i, len(low), columns)
        for kind, (low, high) in (("observation", ranges.observations), ("action", ranges.actions))
        for i in np.flatnonzero(low == high).tolist()
    ]


def _precision_problem(low: float, high: float, *, change: float, is_normalised: bool) -> str | None:
    span, step = high - low, float(np.spacing(np.float32(max(abs(low), abs(high)))))
    way_out = "subtract its smallest value, or its value at the start of the episode, in the log, or leave it out"
    if span == 0:
        if abs(low) < 2**24:
            return None
        return (
            f"is {low:.9g} in every row; numbers are read as float32, which has none within {step:g} of that; {way_out}"
        )
    if span < FEWEST_VALUES * step:
        return (
            f"lies between {low:.9g} and {high:.9g}, where float32, as which numbers are read, has only "
            f"{span / step + 1:.0f} values; {way_out}"
        )
    if change <= SMALLEST_CHANGE * step:
        return (
            f"changes by {change:.3g} from row to row at values up to {max(abs(low), abs(high)):.9g}, the least that "
            f"float32, as which numbers are read, can tell apart there; {way_out}"
        )
    if is_normalised and span < SMALLEST_DEVIATION:
        return (
            f"lies between {low:.3g} and {high:.3g}; a deviation below {SMALLEST_DEVIATION:g} counts as none and is "
            f"not normalised: give it in a smaller unit"
        )
    return None


def _reward_size_traps(ranges: Ranges) -> Iterator[str]:
    usual = ranges.usual_reward[ranges.usual_reward > 0]
    typical = float(np.median(usual if len(usual) else ranges.largest_reward))
    if typical > 0 and (largest := float(ranges.largest_reward.max())) > SWALLOWED * typical:
        yield (
            f"a reward of size {largest:.3g} stands among rewards of about {typical:.3g}: in a return the others "
            f"count for nothing; clip it in the log, or leave its episode out"
        )


def _unused_bound_traps(ranges: Ranges, spec: SpaceSpec, columns: Mapping[str, str | None] | None) -> Iterator[str]:
    low, high = np.asarray(spec.action_low), np.asarray(spec.action_high)
    if not spec.is_bounded or len(low) != ranges.actions.shape[1]:
        return
    span = ranges.actions[1] - ranges.actions[0]
    for i in np.flatnonzero((span > 0) & (span < UNUSED * (high - low))).tolist():
        yield (
            f"{column_name('action', i, len(low), columns)} lies between {ranges.actions[0, i]:.4g} and "
            f"{ranges.actions[1, i]:.4g}, {span[i] / (high[i] - low[i]):.1g} of its bounds {low[i]:.4g}.."
            f"{high[i]:.4g}, which a policy can't tell apart; set data.action_bounds=data, or data.action_scale"
        )


def column_name(kind: str, i: int, num: int, columns: Mapping[str, str | None] | None) -> str:
    """The name of an observation or action: its column's where `columns` names one for each, else its number."""
    given = [name.strip() for name in ((columns or {}).get(kind) or "").split(",")]
    return f"column {given[i]}" if len(given) == num and given[i] else f"{kind} dimension {i}"


def _usual_change(column: Float[ndarray, "N"]) -> float:
    changes = np.abs(np.diff(column))
    changes = changes[changes > 0]
    is_whole = np.abs(column).max() < 2**24 and (column == np.round(column)).all()
    return np.inf if is_whole or not len(changes) else float(np.median(changes))


def _extremes(values: Float[ndarray, "N D"]) -> Float[ndarray, "2 D"]:
    """Smallest and largest of each column. Taking many rows as one first is ten times as fast for few columns."""
    num, dimension = values.shape
    whole = num // ROWS_SIDE_BY_SIDE * ROWS_SIDE_BY_SIDE
    parts = [values[whole:]]
    if whole:
        wide = values[:whole].reshape(-1, ROWS_SIDE_BY_SIDE * dimension)
        parts += [each.reshape(ROWS_SIDE_BY_SIDE, dimension) for each in (wide.min(axis=0), wide.max(axis=0))]
    rows = np.concatenate(parts)
    return np.stack([rows.min(axis=0), rows.max(axis=0)])

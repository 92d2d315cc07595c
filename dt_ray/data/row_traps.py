"""Problems with the rows of a log: repeated rows, rows that are no steps, returns-to-go that are no sums of rewards.

Legend: N transitions, E episodes.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from dt_ray.data.returns import returns_to_go
from dt_ray.data.transitions import TransitionDataset

RARE = 0.05  # share of rewards inside episodes that are 0; below it rewards count as dense
EQUAL = 1e-3  # of the largest return: smaller differences are rounding


def row_traps(data: TransitionDataset) -> Iterator[str]:
    """One line for each thing that looks wrong, and what mends it."""
    yield from _repeated_row_traps(data)
    yield from _dummy_row_traps(data)
    yield from return_traps(data)


def _repeated_row_traps(data: TransitionDataset) -> Iterator[str]:
    rows = np.concatenate([data.observations, data.actions, data.rewards[:, None]], axis=1)
    same = (rows[1:] == rows[:-1]).all(axis=1)
    same[data.ends[:-1] - 1] = False
    if len(steps := np.flatnonzero(same)):
        episode = bisect_right(data.starts, steps[0]) - 1
        yield (
            f"{len(steps)} row(s) repeat the one before, the first in episode {data.episode_ids[episode]} at step "
            f"{steps[0] + 1 - data.starts[episode]}: duplicates, unless nothing moved"
        )


def _dummy_row_traps(data: TransitionDataset) -> Iterator[str]:
    """Gymnasium's vector environments with next-step autoreset give a row after each end, from there to the reset."""
    is_long = data.lengths > 1
    heads, tails = data.starts[1:][is_long[1:]], data.ends[is_long & ~data.terminated[data.ends - 1]] - 1
    inner = np.setdiff1d(np.arange(data.num_transitions - 1), np.concatenate([data.starts, data.ends - 1]))
    if len(heads) < 2 or not len(inner):
        return
    begin, end = data.rewards[heads] == 0, data.rewards[tails] == 0
    moved = (np.abs(np.diff(data.observations, axis=0)) / (data.observations.std(axis=0) + 1e-6)).max(axis=1)
    jump, usual = float(np.median(moved[heads])), moved[inner]
    is_dense = (data.rewards[inner] == 0).mean() <= RARE
    if is_dense:
        is_other = data.rewards[0] != 0 or jump > 2 * np.median(usual)
        where = "begin" if is_other and begin.mean() >= 0.5 else "end" if end.sum() > 2 and end.mean() >= 0.5 else None
    else:
        where = "begin" if begin.mean() >= 0.9 and jump > np.quantile(usual, 0.95) else None
    if where is not None:
        num = int((begin if where == "begin" else end).sum())
        yield (
            f"{num} of {data.num_episodes} episodes {where} with a row of reward 0, it seems the one that vector "
            f"environments give after each end (next-step autoreset of Gymnasium 1.0): its observation is the last "
            f"of the episode before, its action was ignored; leave these rows out of the log"
        )


def return_traps(data: TransitionDataset, *, discount: float = 1.0) -> Iterator[str]:
    """A line where the logged returns-to-go are not what the rewards add up to."""
    if data.returns_to_go is None:
        return
    logged, rewards = data.returns_to_go.astype(np.float64), data.rewards.astype(np.float64)
    sums = returns_to_go(rewards, data.starts, discount=discount).astype(np.float64)
    scale = float(np.abs(sums).max()) or 1.0
    if _is_close(logged, sums, scale) or _goes_on_past_the_log(data, logged - sums, scale):
        return
    what = _describe_returns(data, logged, rewards, sums, scale)
    yield (
        f"the logged returns-to-go are not the sums of the rewards: {what}. In training a policy sees them, "
        f"but while it acts it sees the target return minus the rewards; set data.return_source=rewards, unless this "
        f"is intended"
    )


def _goes_on_past_the_log(data: TransitionDataset, surplus: Float[ndarray, "N"], scale: float) -> bool:
    """Whether the returns of cut episodes also count rewards from after the end of the log."""
    last = surplus[data.ends - 1]
    is_constant = _is_close(surplus, np.repeat(last, data.lengths), scale)
    differ = data.num_episodes == 1 or not _is_close(last, last[0], scale)
    ended = last[data.terminated[data.ends - 1]]
    return is_constant and differ and _is_close(ended, 0.0, scale)


def _describe_returns(
    data: TransitionDataset,
    logged: Float[ndarray, "N"],
    rewards: Float[ndarray, "N"],
    sums: Float[ndarray, "N"],
    scale: float,
) -> str:
    if np.ptp(logged) == 0:
        return f"they are {logged[0]:g} at every step"
    factor = float(logged @ sums / (sums @ sums)) if sums.any() else 0.0
    if factor and _is_close(logged / factor, sums, scale):
        return f"they are {factor:.4g} times those"
    if _is_close(logged, sums - rewards, scale):
        return "they leave out the reward of their own step"
    if _is_close(logged - sums, float(np.mean(logged - sums)), scale):
        return f"they are {np.mean(logged - sums):.4g} more"
    inner = np.setdiff1d(np.arange(data.num_transitions), data.ends - 1)
    later, rest = logged[inner + 1], logged[inner] - rewards[inner]
    discount = float(later @ rest / (later @ later)) if later.any() else 0.0
    if 0 < discount < 1 and _is_close(later * discount, rest, scale):
        return f"they are discounted by {discount:.4g}, which data.discount={discount:.4g} says"
    return f"they differ by {np.abs(logged - sums).mean():.3g} on average"


def _is_close(one: Float[ndarray, "N"], other: Float[ndarray, "N"] | float, scale: float) -> bool:
    return bool((np.abs(one - other) <= EQUAL * scale).all())

"""Returns-to-go: what the policy is conditioned on (Chen et al. 2021, section 3)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

ROUNDING = 2.0**-52  # of a float64 sum
FORGOTTEN = 1e-8  # of the largest reward of an episode: what its sums may lose to those of others


class Tail(NamedTuple):
    """The rewards after some episodes, where many episodes are summed together from the end of the last one."""

    total: float | None  # of all rewards after them; None: there are none
    is_swallowed: bool  # small rewards would be lost beside a huge one: each episode is summed by itself


def returns_to_go(
    rewards: Float[ndarray, "N"], starts: Int[ndarray, "E"], *, discount: float = 1.0, tail: Tail | None = None
) -> Float[ndarray, "N"]:
    """Discounted sum of rewards from each step to the end of its own episode, summed in float64.

    R_t = r_t + discount * R_{t+1}, restarting at every episode boundary. With a `tail` the result is, to the last bit,
    what these episodes have in the row that they are a part of.
    """
    if not len(rewards):
        return np.zeros(0, np.float32)
    lengths = np.diff(np.append(starts, len(rewards)))
    if discount == 1.0:
        tail = tail or find_tails([(rewards, starts)])[0]
        if tail.is_swallowed:
            parts = np.split(rewards.astype(np.float64), starts[1:])
            return np.concatenate([np.cumsum(part[::-1])[::-1] for part in parts]).astype(np.float32)
        # A running sum from the back, less what it held at the episode's end.
        total = _sums_from_the_back(rewards, tail.total)
        after = np.append(total, tail.total or 0.0)[np.append(starts[1:], len(rewards))]
        return (total - np.repeat(after, lengths)).astype(np.float32)
    result = rewards.astype(np.float64)
    # One step back from the end in all episodes at once: as many passes as the longest has steps.
    order = np.argsort(-lengths, kind="stable")
    ends, longest_first = (starts + lengths)[order], lengths[order]
    for back in range(2, int(longest_first[0]) + 1):
        rows = ends[: np.searchsorted(-longest_first, -back, side="right")] - back
        result[rows] += discount * result[rows + 1]
    return result.astype(np.float32)


def find_tails(parts: Iterable[tuple[Float[ndarray, "N"], Int[ndarray, "E"]]]) -> list[Tail]:
    """The tail of each part of a row of episodes; parts are given as rewards and starts, the last one first."""
    totals: list[float | None] = [None]
    highest, smallest = 0.0, np.inf
    for rewards, starts in parts:
        sums = _sums_from_the_back(rewards, totals[-1])
        largest = np.maximum.reduceat(np.abs(rewards), starts).astype(np.float64)  # of each episode
        highest, smallest = max(highest, np.abs(sums).max()), min(smallest, largest[largest > 0].min(initial=np.inf))
        totals.append(float(sums[0]))
    is_swallowed = bool(highest * ROUNDING > FORGOTTEN * smallest)
    return [Tail(total, is_swallowed) for total in totals[:-1]]


@dataclass(frozen=True, kw_only=True)
class ReturnRecursion:
    """The returns-to-go that a policy is shown while it acts: R_{t+1} = (R_t - r_t) / discount, as in training windows.

    Dividing lets an error grow without end. With a discount below 1, what is shown therefore stays between the lowest
    and the highest return-to-go that the training data had at that timestep. An infinite one, which asks for as much as
    can be had, stays infinite.
    """

    discount: float
    bounds: Float[ndarray, "2 K"]  # by timestep; later timesteps have those of the last one. K = 0: none

    def start(self, target_returns: Float[ndarray, "N"]) -> Float[ndarray, "N"]:
        """What is shown at the first step."""
        return self._bounded(target_returns, 0)

    def follow(self, returns_to_go: Float[ndarray, "N"], rewards: Float[ndarray, "N"], timestep: int) -> ndarray:
        """What is shown at `timestep`, after these returns-to-go and rewards of the step before."""
        missing = returns_to_go - rewards
        return missing if self.discount == 1.0 else self._bounded(missing / self.discount, timestep)

    def _bounded(self, returns_to_go: Float[ndarray, "N"], timestep: int) -> Float[ndarray, "N"]:
        num = self.bounds.shape[1]
        if not num:
            return returns_to_go
        bounded = np.clip(returns_to_go, *self.bounds[:, min(timestep, num - 1)])
        return np.where(np.isinf(returns_to_go), returns_to_go, bounded)


def bounds_by_timestep(
    parts: Iterable[tuple[Float[ndarray, "N"], Int[ndarray, "N"]]], *, max_timesteps: int
) -> Float[ndarray, "2 K"]:
    """The lowest and the highest return-to-go at each timestep, of parts that are returns-to-go and their timesteps.

    Timesteps from `max_timesteps` - 1 on share the last column.
    """
    bounds, nothing = np.empty((2, 0), np.float32), np.array([[np.inf], [-np.inf]], np.float32)
    for to_go, timesteps in parts:
        places = np.minimum(timesteps, max_timesteps - 1)
        num_new = max(0, int(places.max(initial=-1)) + 1 - bounds.shape[1])
        bounds = np.concatenate([bounds, np.repeat(nothing, num_new, axis=1)], axis=1)
        np.minimum.at(bounds[0], places, to_go)
        np.maximum.at(bounds[1], places, to_go)
    return bounds


def join_bounds(found: Iterable[Float[ndarray, "2 K"]]) -> Float[ndarray, "2 K"]:
    """The bounds of all parts whose bounds these are."""
    every = [each for each in found if each.shape[1]]
    columns: list[tuple[ndarray, ndarray]] = [
        (each[side], np.arange(each.shape[1])) for each in every for side in (0, 1)
    ]
    return bounds_by_timestep(columns, max_timesteps=max((each.shape[1] for each in every), default=1))


def _sums_from_the_back(rewards: Float[ndarray, "N"], behind: float | None) -> Float[ndarray, "N"]:
    backwards = rewards[::-1].astype(np.float64)
    if behind is not None:
        backwards[0] += behind
    return np.cumsum(backwards)[::-1]

"""Returns-to-go: what the policy is conditioned on (Chen et al. 2021, section 3)."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

ROUNDING = 2.0**-52  # of a float64 sum
FORGOTTEN = 1e-8  # of the largest reward of an episode: what its sums may lose to those of others


def returns_to_go(
    rewards: Float[ndarray, "N"], starts: Int[ndarray, "E"], *, discount: float = 1.0
) -> Float[ndarray, "N"]:
    """Discounted sum of rewards from each step to the end of its own episode, summed in float64.

    R_t = r_t + discount * R_{t+1}, restarting at every episode boundary.
    """
    if not len(rewards):
        return np.zeros(0, np.float32)
    lengths = np.diff(np.append(starts, len(rewards)))
    if discount == 1.0:
        # A running sum from the back, less what it held at the episode's end.
        total = np.cumsum(rewards[::-1], dtype=np.float64)[::-1]
        largest = np.maximum.reduceat(np.abs(rewards), starts).astype(np.float64)  # of each episode
        if np.abs(total).max() * ROUNDING > FORGOTTEN * largest[largest > 0].min(initial=np.inf):
            # One huge reward would swallow those of all episodes before it.
            parts = np.split(rewards.astype(np.float64), starts[1:])
            return np.concatenate([np.cumsum(part[::-1])[::-1] for part in parts]).astype(np.float32)
        after = np.append(total, 0.0)[np.append(starts[1:], len(rewards))]
        return (total - np.repeat(after, lengths)).astype(np.float32)
    result = rewards.astype(np.float64)
    # One step back from the end in all episodes at once: as many passes as the longest has steps.
    order = np.argsort(-lengths, kind="stable")
    ends, longest_first = (starts + lengths)[order], lengths[order]
    for back in range(2, int(longest_first[0]) + 1):
        rows = ends[: np.searchsorted(-longest_first, -back, side="right")] - back
        result[rows] += discount * result[rows + 1]
    return result.astype(np.float32)

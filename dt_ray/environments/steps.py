"""The interface of environments that are stepped together.

Legend: N episodes, M those still live, S observation, A action dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from jaxtyping import Bool, Float, Int
from numpy import ndarray


@dataclass(frozen=True, kw_only=True)
class Steps:
    """The results of one step of the live episodes."""

    observations: Float[ndarray, "M S"]
    rewards: Float[ndarray, "M"]  # float64
    terminated: Bool[ndarray, "M"]
    truncated: Bool[ndarray, "M"]


class Environments(Protocol):
    action_shape: tuple[int, ...]

    def reset(self, seeds: Sequence[int]) -> Float[ndarray, "N S"]:
        """Begins one episode for each seed."""
        ...

    def step(self, live: Int[ndarray, "M"], actions: Float[ndarray, "M A"]) -> Steps:
        """One step of the episodes with these indices."""
        ...

    def close(self) -> None: ...

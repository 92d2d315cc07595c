"""The report on returns that were estimated from a log alone, and its JSON form: `evaluations/offline-step-….json`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from pydantic import TypeAdapter

from dt_ray.config.targets import TargetReturn, as_json
from dt_ray.runs.evaluation_report import Number
from dt_ray.runs.writing import to_json


@dataclass(frozen=True, kw_only=True)
class Diagnostics:
    """What the estimate for one target return was judged by."""

    estimate: Number  # what the world model says, believable or not
    half_width: Number  # of its 90% interval
    disagreement: Number  # of the members along the rollouts, over that on held-out episodes
    fragility: Number  # the share of the estimate that goes or comes with errors as large as the world model's own
    share_cut: float  # of the rollouts that were ended where the members disagree too much
    mean_length: float  # of the rollouts, in steps


@dataclass(frozen=True, kw_only=True)
class OfflineTarget:
    """What is expected of a policy that is asked for one target return."""

    target_return: TargetReturn
    estimated_return: float | None  # the mean over episodes; None where it should not be believed
    interval90: tuple[float, float] | None  # of the mean of 100 real episodes
    supported_share: float | None  # of the starts, whose logged returns reach as far; None of a policy not asked
    nearest_episodes: tuple[int, ...]  # ids of the logged episodes whose returns are nearest to the target
    nearest_returns: tuple[Number, ...]
    doubts: tuple[str, ...]  # why the estimate should not be believed
    diagnostics: Diagnostics

    @property
    def verdict(self) -> str:
        """The same in words."""
        parts = [f"no estimate: {'; '.join(self.doubts)}"] if self.doubts else ["the estimate can be believed"]
        if self.supported_share is not None and self.supported_share < MOSTLY:
            parts.append(f"the log backs this wish at {self.supported_share:.0%} of its starts only")
        return "; ".join(parts)

    @property
    def is_backed(self) -> bool:
        """Whether the log supports the wish at most starts, and the estimate can be believed."""
        return not self.doubts and (self.supported_share is None or self.supported_share >= MOSTLY)


MOSTLY = 0.5  # of the starts


@dataclass(frozen=True, kw_only=True)
class OfflineReport:
    """Estimates of what the policy after `step` updates will reach, from a log alone."""

    step: int
    log: tuple[str, ...]  # its paths
    world_model: str  # the checkpoint in which the policy was rolled out
    num_starts: int
    logged_returns: tuple[float, float]  # the lowest and the highest of an episode
    supported: tuple[float, float]  # target returns that the log backs at most of its starts
    best_target: TargetReturn | None  # what `auto` means; None where no estimate can be believed
    targets: tuple[OfflineTarget, ...]
    wall_s: float

    @classmethod
    def from_json(cls, text: str) -> OfflineReport:
        """Raises:
        ValueError: the text is not the JSON form of a report.
        """
        return _adapter().validate_json(text)

    def to_dict(self) -> dict[str, Any]:
        values = _adapter().dump_python(self, mode="json")
        for target, written in zip(self.targets, values["targets"], strict=True):
            written["verdict"] = target.verdict
        return values

    def to_json(self) -> str:
        return to_json(self.to_dict(), indent=1)

    @property
    def best(self) -> OfflineTarget | None:
        """What is expected at `best_target`."""
        return next((each for each in self.targets if each.target_return == self.best_target), None)

    @property
    def score(self) -> float | None:
        """The estimate at `best_target`: what checkpoints and runs are compared by without an environment."""
        return None if self.best is None else self.best.estimated_return

    def to_recommendation(self) -> dict[str, Any]:
        """Which target return to ask this policy for, and what is expected then, as `summary.json` has it."""
        assert self.best is not None, "something is recommended"
        return {
            "step": self.step,
            "target_return": as_json(self.best.target_return),
            "estimated_return": self.best.estimated_return,
            "interval90": self.best.interval90,
        }


@cache
def _adapter() -> TypeAdapter[OfflineReport]:
    return TypeAdapter(OfflineReport)

"""The report on one evaluation of a policy, and its JSON form, which `evaluations/*.json` and `summary.json` hold."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any

from pydantic import BeforeValidator, TypeAdapter

from dt_ray.runs.writing import to_json

# JSON has no NaN: a number that is null there is NaN here.
Number = Annotated[float, BeforeValidator(lambda value: math.nan if value is None else value)]


@dataclass(frozen=True, kw_only=True)
class TargetResult:
    """What the episodes of one target return reached."""

    target_return: float
    return_mean: Number
    return_std: Number
    return_ci95: tuple[Number, Number]  # bootstrap interval of the mean
    normalized_score: float | None  # None where the environment's random and reference returns aren't known
    episode_returns: tuple[Number, ...]  # in the order of the episodes' seeds
    episode_lengths: tuple[int, ...]

    @property
    def obedience_error(self) -> float:
        """The distance between the mean return and the target return."""
        return abs(self.return_mean - self.target_return)


@dataclass(frozen=True, kw_only=True)
class EvaluationReport:
    """An evaluation after `step` updates: the same episodes for every target return."""

    step: int
    env_id: str | None  # None for a log that names no environment
    num_episodes: int  # for each target return
    seed: int  # of the first episode
    wall_s: Number
    env_steps_per_s: Number
    targets: tuple[TargetResult, ...]  # empty where no episode was played

    @classmethod
    def from_json(cls, text: str) -> EvaluationReport:
        """Raises:
        ValueError: the text is not the JSON form of a report.
        """
        return _adapter().validate_json(text)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EvaluationReport:
        """The report whose JSON form this is, such as `last` of a run's summary."""
        return _adapter().validate_python(values)

    def to_dict(self) -> dict[str, Any]:
        """The JSON form; numbers that are not finite stay as they are."""
        return _adapter().dump_python(self, mode="json")

    def to_json(self) -> str:
        return to_json(self.to_dict(), indent=1)

    @property
    def score(self) -> float:
        """What makes one evaluation better than another: the mean return at the highest target return, or NaN."""
        if not self.targets:
            return math.nan
        return max(self.targets, key=lambda target: target.target_return).return_mean

    @property
    def return_means(self) -> dict[float, float]:
        """The mean return for each target return."""
        return {target.target_return: target.return_mean for target in self.targets}

    @property
    def highest_mean(self) -> float:
        """The highest mean return at any target return, or NaN."""
        return max((mean for mean in self.return_means.values() if not math.isnan(mean)), default=math.nan)


@cache
def _adapter() -> TypeAdapter[EvaluationReport]:
    return TypeAdapter(EvaluationReport)


def best_of(reports: Iterable[EvaluationReport]) -> EvaluationReport | None:
    """The evaluation with the best score: the earliest of equal ones, and none whose score is not finite."""
    usable = (report for report in reports if math.isfinite(report.score))
    return max(usable, key=lambda report: report.score, default=None)

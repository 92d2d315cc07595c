"""The report on one evaluation of a policy, and its JSON form, which `evaluations/*.json` and `summary.json` hold."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Annotated, Any

import numpy as np
from pydantic import BeforeValidator, TypeAdapter

from dt_ray.config.targets import TargetReturn
from dt_ray.runs.writing import to_json

# JSON has no NaN: a number that is null there is NaN here.
Number = Annotated[float, BeforeValidator(lambda value: math.nan if value is None else value)]


@dataclass(frozen=True, kw_only=True)
class TargetResult:
    """The results of the episodes with one target return."""

    target_return: TargetReturn  # infinity is "max" in JSON
    return_mean: Number
    return_std: Number
    return_ci95: tuple[Number, Number]  # bootstrap interval of the mean
    normalized_score: float | None  # None where the environment's random and reference returns aren't known
    episode_returns: tuple[Number, ...]  # in the order of the episodes' seeds
    episode_lengths: tuple[int, ...]
    asked_target_return: TargetReturn | None = None  # another one, which was clipped to `target_return`

    @property
    def obedience_error(self) -> float:
        """The distance between the mean return and the target return; NaN where as much as possible was asked for."""
        return abs(self.return_mean - self.target_return) if math.isfinite(self.target_return) else math.nan

    @property
    def distances(self) -> tuple[float, float]:
        """How far the return of an episode is from the target return: median and 90th percentile, or NaN."""
        if not math.isfinite(self.target_return):
            return math.nan, math.nan
        found = np.quantile(np.abs(np.array(self.episode_returns) - self.target_return), [0.5, 0.9])
        return float(found[0]), float(found[1])


@dataclass(frozen=True, kw_only=True)
class ActionErrors:
    """Errors of actions over a group of logged steps, as in `HeldOutResult`."""

    lowest: float  # of the group's steps or returns, by which the groups are formed
    highest: float
    num_steps: int
    action_error: Number
    cloning_error: Number
    constant_error: Number


@dataclass(frozen=True, kw_only=True)
class HeldOutResult:
    """The errors of a policy's actions on held-out episodes of the log.

    Errors are root mean squares over steps and dimensions; 1 is half of the width of the action bounds.
    """

    num_steps: int
    action_error: Number  # of the policy
    cloning_error: Number  # of the cheapest behaviour cloning: ridge regression of actions on observations
    constant_error: Number  # of the mean action
    by_step: tuple[ActionErrors, ...]
    by_return: tuple[ActionErrors, ...]

    def rows(self) -> Iterator[tuple[str, tuple[float, float, float]]]:
        """Groups of steps in words, with the errors of the policy, of cloning and of the mean action."""
        yield "all", (self.action_error, self.cloning_error, self.constant_error)
        for name, groups in (("step", self.by_step), ("return", self.by_return)):
            for group in groups:
                errors = (group.action_error, group.cloning_error, group.constant_error)
                low, high = f"{group.lowest:.4g}", f"{group.highest:.4g}"
                yield f"{name} {low}" + (f" .. {high}" if high != low else ""), errors


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
    held_out: HeldOutResult | None = None  # where there is no environment

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
        values = _adapter().dump_python(self, mode="json")
        if self.held_out is None:
            del values["held_out"]
        for target in values["targets"]:
            if target["asked_target_return"] is None:
                del target["asked_target_return"]
        return values

    def to_json(self) -> str:
        return to_json(self.to_dict(), indent=1)

    def clipped_from(self, asked: Sequence[float]) -> EvaluationReport:
        """The same report, that also says which target returns were asked for before they were clipped."""
        targets = [
            replace(target, asked_target_return=wish if wish != target.target_return else None)
            for target, wish in zip(self.targets, asked, strict=True)
        ]
        return replace(self, targets=tuple(targets))

    @property
    def score(self) -> float:
        """The number by which evaluations are compared: the mean return at the highest target return, or NaN.

        Without an environment it is minus the error of the actions on held-out episodes.
        """
        if self.held_out is not None:
            return -self.held_out.action_error
        if not self.targets:
            return math.nan
        return max(self.targets, key=lambda target: target.target_return).return_mean

    @property
    def obedience_error(self) -> float:
        """The mean over the target returns that are numbers of what the mean return is off by, or NaN."""
        found = [target.obedience_error for target in self.targets if math.isfinite(target.target_return)]
        return float(np.mean(found)) if found else math.nan

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

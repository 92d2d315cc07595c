"""The report on an evaluation, in the form of `evaluations/*.json`."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any


def score(report: Mapping[str, Any]) -> float:
    """What makes one evaluation better than another: the mean return at the highest target return, or NaN."""
    mean = max(report["targets"], key=lambda target: target["target_return"])["return_mean"]
    return math.nan if mean is None else mean


def best_of(reports: Iterable[dict[str, Any]]) -> dict[str, Any] | None:
    """The evaluation with the best score; the earlier of equal ones, and none whose returns are no numbers."""
    return max((report for report in reports if math.isfinite(score(report))), key=score, default=None)


def decode_evaluation(text: str) -> dict[str, Any]:
    """The report in a file of `evaluations/`; a mean that is null there is NaN."""
    report = json.loads(text)
    for target in report["targets"]:
        target |= {key: math.nan for key in ("return_mean", "return_std") if target[key] is None}
        target["return_ci95"] = [math.nan if bound is None else bound for bound in target["return_ci95"]]
    return report

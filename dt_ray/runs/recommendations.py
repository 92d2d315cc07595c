"""What the estimates beside a checkpoint say about target returns: which one to ask for, and which ones go too far."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass

from dt_ray.config.targets import show_target
from dt_ray.errors import RunError
from dt_ray.runs.checkpoint import read_facts
from dt_ray.runs.folder import run_of
from dt_ray.runs.offline_report import OfflineReport
from dt_ray.runs.storage import Folder

log = logging.getLogger("dt_ray")


@dataclass(frozen=True, kw_only=True)
class CheckedTarget:
    """A target return that was held against what the log supports."""

    asked: float
    used: float  # another one where it was clipped
    warning: str | None  # where the log does not support what was asked for


def estimates_beside(checkpoint: Folder) -> OfflineReport | None:
    """The estimates from the log alone for a checkpoint that lies in a run; None where there are none."""
    run = run_of(checkpoint)
    return None if run is None else run.read_offline(read_facts(checkpoint).step)


def needed_estimates(checkpoint: Folder, needed_by: str) -> OfflineReport:
    """The estimates beside a checkpoint.

    Raises:
        RunError: nothing was estimated yet.
    """
    report = estimates_beside(checkpoint)
    if report is None:
        raise RunError(
            f"{needed_by}: nothing was estimated for {checkpoint} yet; do that first: "
            f"python -m dt_ray.evaluate {run_of(checkpoint) or checkpoint} --offline"
        )
    return report


def recommended_target(checkpoint: Folder) -> float:
    """The target return that `auto` means for a checkpoint.

    Raises:
        RunError: nothing was estimated yet, or no estimate can be believed.
    """
    report = needed_estimates(checkpoint, "target return auto")
    if report.best_target is None:
        raise RunError(
            f"target return auto: no estimate for {checkpoint} can be believed at a target return that the log backs; "
            f"give a number"
        )
    return report.best_target


def check_target(target_return: float, report: OfflineReport | None, *, clip: bool = False) -> CheckedTarget:
    """Holds a target return against the ones that the log supports; `clip` takes the nearest of those instead.

    `max` is never beyond what the log supports, and where nothing was estimated nothing is known.
    """
    low, high = (-math.inf, math.inf) if report is None else report.supported
    if target_return == math.inf or low <= target_return <= high:
        return CheckedTarget(asked=target_return, used=target_return, warning=None)
    used = min(max(target_return, low), high) if clip else target_return
    beyond = (
        f"target return {show_target(target_return)} is outside of {low:.4g} .. {high:.4g}, which the log backs at "
        f"most of its starts"
    )
    then = f"{show_target(used)} is asked for instead" if clip else "nobody knows what the policy will do"
    return CheckedTarget(asked=target_return, used=used, warning=f"{beyond}: {then}")


def check_targets(target_returns: Iterable[float], checkpoint: Folder, *, clip: bool) -> list[CheckedTarget]:
    """The same for several target returns of a checkpoint's policy; warnings are logged.

    Raises:
        RunError: `clip`, and nothing was estimated yet.
    """
    report = needed_estimates(checkpoint, "clip") if clip else estimates_beside(checkpoint)
    checked = [check_target(each, report, clip=clip) for each in target_returns]
    for warning in dict.fromkeys(each.warning for each in checked if each.warning is not None):
        log.warning("%s", warning)
    return checked

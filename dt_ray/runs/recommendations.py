"""What the estimates beside a checkpoint say about target returns: which one to ask for, and which ones go too far."""

from __future__ import annotations

import math

from dt_ray.config.targets import show_target
from dt_ray.errors import RunError
from dt_ray.runs.checkpoint import read_facts
from dt_ray.runs.folder import run_of
from dt_ray.runs.offline_report import OfflineReport
from dt_ray.runs.storage import Folder


def estimates_beside(checkpoint: Folder) -> OfflineReport | None:
    """The estimates from the log alone for a checkpoint that lies in a run; None where there are none."""
    run = run_of(checkpoint)
    return None if run is None else run.read_offline(read_facts(checkpoint).step)


def recommended_target(checkpoint: Folder) -> float:
    """The target return that `auto` means for a checkpoint.

    Raises:
        RunError: nothing was estimated yet, or no estimate can be believed.
    """
    report = estimates_beside(checkpoint)
    if report is None:
        raise RunError(
            f"target return auto: nothing was estimated for {checkpoint} yet; do that first: "
            f"python -m dt_ray.evaluate {run_of(checkpoint) or checkpoint} --offline"
        )
    if report.best_target is None:
        raise RunError(
            f"target return auto: no estimate for {checkpoint} can be believed at a target return that the log backs; "
            f"give a number"
        )
    return report.best_target


def doubt_about(target_return: float, report: OfflineReport | None) -> str | None:
    """A sentence about a target return that the log does not support; None where it does, or where nothing is known."""
    if report is None or not math.isfinite(target_return):
        return None
    low, high = report.supported
    if low <= target_return <= high:
        return None
    return (
        f"target return {show_target(target_return)} is outside of {low:.4g} .. {high:.4g}, which the log backs at "
        f"most of its starts: nobody knows what the policy will do"
    )

"""Figures and tables of estimates from a log alone: estimated against asked, and against what was reached."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from dt_ray.config.targets import show_target
from dt_ray.reports.figures import GREY, colors_of
from dt_ray.reports.records import Group
from dt_ray.runs.offline_report import OfflineReport
from dt_ray.sweeps.tables import Row

TEXT = (
    "What the policies will reach, estimated in a world model of their log alone, with 90% intervals. Hollow marks are "
    "estimates that should not be believed; the table says why. Shaded: target returns that the log does not back at "
    "most of its starts. Crosses: what the newest evaluation reached, where there is an environment."
)


def draw_estimates(
    reports: Mapping[str, OfflineReport], reached: Mapping[str, Mapping[float, float]] | None = None
) -> Figure:
    """Estimated returns against target returns, by label; `reached` has mean returns by target return."""
    figure = Figure(figsize=(6, 5), layout="constrained")
    axes = figure.subplots()
    for (label, report), color in zip(reports.items(), colors_of(reports), strict=True):
        targets = sorted(report.targets, key=lambda each: each.target_return)
        drawn = [each for each in targets if math.isfinite(each.target_return)]
        places = [each.target_return for each in drawn]
        values = [each.diagnostics.estimate for each in drawn]
        halves = [each.diagnostics.half_width for each in drawn]
        axes.errorbar(places, values, yerr=halves, color=color, fmt="none", capsize=3, alpha=0.6)
        for is_doubtful, face in ((False, color), (True, "none")):
            chosen = [number for number, each in enumerate(drawn) if bool(each.doubts) is is_doubtful]
            axes.scatter(
                np.array(places)[chosen], np.array(values)[chosen], edgecolors=color, facecolors=face,
                label=None if is_doubtful else label, zorder=3,
            )  # fmt: skip
        found = {target: mean for target, mean in (reached or {}).get(label, {}).items() if math.isfinite(target)}
        axes.scatter(list(found), list(found.values()), color=color, marker="x", zorder=4)
    (left, right), vertical = axes.get_xlim(), axes.get_ylim()
    low, high = next(iter(reports.values())).supported
    for begin, end in ((left, low), (high, right)):
        if begin < end:
            axes.axvspan(begin, end, color=GREY, alpha=0.12, linewidth=0)
    axes.axline((low, low), slope=1, color=GREY, linestyle="--", linewidth=1)
    axes.set(xlabel="target return", ylabel="estimated return", xlim=(left, right), ylim=vertical)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, frameon=False)
    return figure


def offline_reports(groups: Sequence[Group]) -> dict[str, OfflineReport]:
    """The newest estimates of each group's first run that has some."""
    found: dict[str, OfflineReport] = {}
    for group in groups:
        reports = [report for run in group.runs if (report := run.folder.newest_offline()) is not None]
        if reports:
            found[group.label] = reports[0]
    return found


def estimate_rows(reports: Mapping[str, OfflineReport]) -> list[Row]:
    """A row for each estimate."""
    return [
        {
            "group": label,
            "target_return": show_target(target.target_return),
            "estimated_return": target.estimated_return,
            "low": None if target.interval90 is None else target.interval90[0],
            "high": None if target.interval90 is None else target.interval90[1],
            "supported_share": target.supported_share,
            "verdict": target.verdict,
        }
        for label, report in reports.items()
        for target in report.targets
    ]


def reached_by(groups: Sequence[Group]) -> dict[str, dict[float, float]]:
    """Mean returns by target return, of each group's newest evaluations in the environment."""
    return {
        group.label: {target: float(returns.mean()) for target, returns in group.by_target().items()}
        for group in groups
        if group.last and all(each.targets for each in group.last)
    }

"""Figures and tables for runs without an environment: the errors of actions on held-out episodes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from dt_ray.reports.figures import GREY, colors_of
from dt_ray.reports.records import Group
from dt_ray.runs.evaluation_report import ActionErrors, HeldOutResult
from dt_ray.sweeps.tables import Row

RIVALS = {"linear cloning": "cloning_error", "mean action": "constant_error"}
TEXT = (
    "Root mean square error of the actions on episodes that nothing was trained on, which the policy is shown step by "
    "step and asked for the return that they had; 1 is half of the width of the action bounds. In grey the rules that "
    "a policy should beat: ridge regression of actions on observations (dashed) and the mean action (dotted)."
)


def draw_action_errors(groups: Sequence[Group]) -> Figure:
    """Errors by step and by return, of the newest evaluation of each group's first run."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, name in zip(figure.subplots(1, 2, sharey=True), ("by_step", "by_return"), strict=True):
        for number, (group, color) in enumerate(zip(groups, colors_of(groups), strict=True)):
            errors: tuple[ActionErrors, ...] = getattr(result_of(group), name)
            places = [(each.lowest + each.highest) / 2 for each in errors]
            axes.plot(places, [each.action_error for each in errors], color=color, marker="o", label=group.label)
            if number == 0:
                for (rival, error), line in zip(RIVALS.items(), ("--", ":"), strict=True):
                    axes.plot(
                        places, [getattr(each, error) for each in errors], color=GREY, linestyle=line, label=rival
                    )
        axes.set(xlabel={"by_step": "step of the episode", "by_return": "return of the episode"}[name])
        axes.grid(alpha=0.25)
    figure.axes[0].set_ylabel("error of actions")
    figure.axes[0].set_ylim(bottom=0)
    figure.axes[0].legend(fontsize=8, frameon=False)
    return figure


def action_error_rows(groups: Sequence[Group]) -> list[Row]:
    """A row for each run and group of steps."""
    rows: list[dict[str, Any]] = []
    for group in groups:
        for run in group.runs:
            found = run.evaluations[-1].held_out
            assert found is not None
            for name, (policy, cloning, constant) in found.rows():
                common = {"group": group.label, "run": run.folder.folder.name, "seed": run.config.seed, "steps": name}
                rows.append({**common, "policy": policy, "linear cloning": cloning, "mean action": constant})
    return rows


def result_of(group: Group) -> HeldOutResult:
    found = group.last[0].held_out
    assert found is not None
    return found

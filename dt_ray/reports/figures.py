"""The figures of a report. Colours are told apart by colour-blind readers; axes have names and units."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from matplotlib import colormaps
from matplotlib.figure import Figure
from numpy import ndarray

from dt_ray.config.targets import show_target
from dt_ray.errors import UserError
from dt_ray.play.rollout import Rollouts
from dt_ray.reports.records import Group, ReturnsByTarget, interval_of, mean_curve
from dt_ray.runs.evaluation_report import EvaluationReport
from dt_ray.sweeps.tables import Row

OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
GREY = "#7f7f7f"
PICTURES = (".png", ".svg", ".pdf")
MAX_VIOLIN_GROUPS = 4
MAX_TICKS = 8  # values of an axis that are set at equal distances
PENDULUM_DT = 0.05  # seconds a step


def save_figure(figure: Figure, file: str) -> None:
    """Raises:
    UserError: the file is no picture, by its name.
    """
    if Path(file).suffix.lower() not in PICTURES:
        raise UserError(f"a picture is a {', '.join(PICTURES)} file, got {file!r}")
    Path(file).absolute().parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)


def colors_of(groups: Collection[Any]) -> list[Any]:
    """Colours by hand for a few groups, along a perceptually uniform scale for many."""
    if len(groups) <= len(OKABE_ITO):
        return list(OKABE_ITO[: len(groups)])
    return list(colormaps["viridis"](np.linspace(0, 0.9, len(groups))))


def draw_learning(groups: Sequence[Group]) -> Figure:
    """Loss and return, or error of actions, by update; bands are 95% intervals over seeds."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for group, color in zip(groups, colors_of(groups), strict=True):
        losses = [{line["step"]: line["train/loss"] for line in run.metrics} for run in group.runs if run.metrics]
        returns = [{report.step: _reached(report) for report in run.evaluations} for run in group.runs]
        for axes, curves in ((left, losses), (right, returns)):
            if curves:
                steps, means, half = mean_curve(curves)
                axes.plot(steps, means, color=color, label=group.label, marker="o" if len(steps) < 12 else None)
                if half is not None:
                    axes.fill_between(steps, means - half, means + half, color=color, alpha=0.2, linewidth=0)
    left.set(ylabel="training loss (squared, of actions in [-1, 1])", yscale="log")
    is_played = any(report.targets for group in groups for report in group.last)
    right.set(ylabel="mean return at the highest target" if is_played else "error of actions in held-out episodes")
    for axes in (left, right):
        axes.set_xlabel("gradient updates")
        axes.grid(alpha=0.25)
    _legend(figure, right)
    return figure


def _reached(report: EvaluationReport) -> float:
    return report.score if report.held_out is None else report.held_out.action_error


def with_numbers(found: ReturnsByTarget) -> ReturnsByTarget:
    """The returns at target returns that are numbers, which `max` is not."""
    return {target: returns for target, returns in found.items() if math.isfinite(target)}


def draw_obedience(
    results: Mapping[str, ReturnsByTarget], dataset: Float[ndarray, "E"] | None = None, *, title: str | None = None
) -> Figure:
    """Return reached against return asked for, of each group by its label, over the returns that are in the data.

    Dots are the seeds of a group, or the episodes of a single run. At least one target return is a number.
    """
    results = {label: with_numbers(found) for label, found in results.items()}
    figure = Figure(figsize=(7.5, 6), layout="constrained")
    axes = figure.add_subplot(6, 1, (2, 6)) if dataset is not None else figure.add_subplot()
    is_one_run = sum(max(map(len, found.values()), default=0) for found in results.values()) == 1
    dots = {
        label: {target: returns[0] if is_one_run else returns.mean(axis=1) for target, returns in found.items()}
        for label, found in results.items()
    }
    asked = [target for found in dots.values() for target in found]
    reached = [value for found in dots.values() for values in found.values() for value in values]
    low, high = min(*asked, *reached), max(*asked, *reached)
    margin = 0.05 * ((high - low) or 1.0)
    axes.plot([low, high], [low, high], color="black", linestyle="--", linewidth=1, label="return asked for")
    for (label, found), color in zip(results.items(), colors_of(results), strict=True):
        intervals = np.array([interval_of(returns) for returns in found.values()])
        means = np.array([returns.mean() for returns in found.values()])
        bars = np.abs(intervals.T - means)
        axes.errorbar(list(found), means, yerr=bars, color=color, marker="o", capsize=3, label=label)
        for target, values in dots[label].items():
            axes.scatter(np.full(len(values), target), values, s=10, color=color, alpha=0.5, linewidths=0)
    axes.scatter([], [], s=10, color=GREY, label="one episode" if is_one_run else "one seed")
    if dataset is not None:
        above = figure.add_subplot(6, 1, 1, sharex=axes)
        above.hist(dataset, bins=80, color=GREY)
        above.set(ylabel="episodes in\nthe data", yticks=[])
        above.tick_params(labelbottom=False)
        beyond = [(low - 2 * margin, dataset.min()), (dataset.max(), high + 2 * margin)]
        spans = [axes.axvspan(*span, color=GREY, alpha=0.15, linewidth=0) for span in beyond if span[0] < span[1]]
        for span in spans[:1]:
            span.set_label("beyond the data")
    axes.set(xlabel="target return (sum of rewards)", ylabel="return reached (sum of rewards)")
    axes.set_xlim(low - margin, high + margin)
    axes.grid(alpha=0.25)
    figure.suptitle(title or "")
    _legend(figure, axes)
    return figure


def draw_episode_returns(results: Mapping[str, ReturnsByTarget]) -> Figure:
    """Every episode's return at each target, as densities, of each group by its label."""
    shown = [(label, found) for label, found in results.items() if found][:MAX_VIOLIN_GROUPS]
    figure = Figure(figsize=(10, 1.2 + 2.6 * len(shown)), layout="constrained")
    grid = np.ravel(figure.subplots(len(shown), 1, sharey=True, squeeze=False))
    for axes, (label, found), color in zip(grid, shown, colors_of(shown), strict=True):
        returns = {target: values.ravel() for target, values in found.items()}
        parts = axes.violinplot(list(returns.values()), showmedians=True, showextrema=False, widths=0.85)
        for body in parts["bodies"]:
            body.set(facecolor=color, alpha=0.5)
        parts["cmedians"].set_color("black")
        for place, (target, values) in enumerate(returns.items(), start=1):
            spread = np.random.default_rng(0).uniform(-0.12, 0.12, len(values))
            axes.scatter(place + spread, values, s=4, color=color, alpha=0.5, linewidths=0)
            if math.isfinite(target):
                axes.hlines(target, place - 0.42, place + 0.42, color="black", linestyle="--", linewidth=1)
        axes.set_xticks(range(1, len(returns) + 1), list(map(show_target, returns)))
        axes.set(title=label, ylabel="episode return")
        axes.grid(alpha=0.25, axis="y")
    grid[-1].set_xlabel("target return (dashed: where it would be)")
    return figure


def draw_dataset_returns(returns: Float[ndarray, "E"], title: str) -> Figure:
    """The histogram of a dataset's episode returns, with its quartiles."""
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.add_subplot()
    axes.hist(returns, bins=min(40, max(5, len(returns) // 5)), color=OKABE_ITO[0], alpha=0.85)
    for share in (0.25, 0.5, 0.75):
        value = np.quantile(returns, share)
        axes.axvline(value, color=OKABE_ITO[1], linestyle="--")
        axes.annotate(f"{share:.0%}: {value:.0f}", (value, 0.97), xycoords=("data", "axes fraction"), rotation=90,
                      va="top", ha="right", fontsize=8)  # fmt: skip
    axes.set(xlabel="episode return (sum of rewards)", ylabel="episodes", title=title)
    axes.grid(alpha=0.25)
    return figure


def draw_heatmap(cells: pd.DataFrame, *, metric: str) -> Figure:
    """A metric by training setting (the index) and target return (the columns)."""
    values = cells.to_numpy(float)
    labels, targets = list(cells.index), list(cells.columns)
    figure = Figure(figsize=(max(6, 1.0 * len(targets) + 3), 1.6 + 0.6 * len(labels)), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(values, cmap="viridis", aspect="auto")
    middle = np.nanmean([np.nanmin(values), np.nanmax(values)])
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            color = "white" if value < middle else "black"
            axes.text(column, row, f"{value:.0f}" if abs(value) >= 10 else f"{value:.2f}", ha="center", va="center",
                      color=color, fontsize=9)  # fmt: skip
    axes.set_xticks(range(len(targets)), list(map(show_target, targets)))
    axes.set_yticks(range(len(labels)), labels)
    axes.set_xlabel("target return (sum of rewards)")
    figure.colorbar(image, label=f"{metric.replace('_', ' ')}, mean over seeds")
    return figure


def draw_parallel(rows: Sequence[Row], keys: Sequence[str], *, metric: str) -> Figure:
    """Each evaluated setting as a line through its values; coloured by the metric."""
    columns = [*keys, metric]
    figure = Figure(figsize=(max(6, 2 * len(columns)), 4.5), layout="constrained")
    axes = figure.add_subplot()
    places = {key: _places([row[key] for row in rows]) for key in columns}
    scores = np.array([row[metric] for row in rows], float)
    order = np.argsort(scores)
    shade = (scores - scores.min()) / (np.ptp(scores) or 1.0)
    for index in order:
        line = [places[key][0][index] for key in columns]
        axes.plot(range(len(columns)), line, color=colormaps["viridis"](shade[index]), alpha=0.8)
    for column, key in enumerate(columns):
        axes.axvline(column, color="black", linewidth=0.8)
        for place, text in places[key][1]:
            axes.annotate(text, (column, place), xytext=(4, 0), textcoords="offset points", fontsize=8, va="center",
                          bbox={"facecolor": "white", "alpha": 0.8, "linewidth": 0, "pad": 1})  # fmt: skip
    axes.set_xticks(range(len(columns)), [key.replace("_", " ") for key in columns])
    axes.set_yticks([])
    axes.set_xlim(-0.1, len(columns) - 0.6)
    for side in ("left", "right", "top", "bottom"):
        axes.spines[side].set_visible(False)
    return figure


def _places(values: Sequence[Any]) -> tuple[Float[ndarray, "N"], list[tuple[float, str]]]:
    """Where values lie on an axis from 0 to 1, by rank where they are not numbers; and its ticks."""
    numbers = [float(value) for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
    if len(numbers) < len(values):
        names = list(dict.fromkeys(map(str, values)))
        places = {name: place / max(1, len(names) - 1) for place, name in enumerate(names)}
        return np.array([places[str(value)] for value in values]), [(place, name) for name, place in places.items()]
    distinct = sorted(set(numbers))
    if len(distinct) <= MAX_TICKS:
        at = {number: place / max(1, len(distinct) - 1) for place, number in enumerate(distinct)}
        return np.array([at[number] for number in numbers]), [(place, f"{number:g}") for number, place in at.items()]
    low, high = distinct[0], distinct[-1]
    is_logarithmic = low > 0 and high / low > 50
    ticks = np.geomspace(low, high, 5) if is_logarithmic else np.linspace(low, high, 5)

    def scale(value: Any) -> Any:
        return np.log(value / low) / np.log(high / low) if is_logarithmic else (value - low) / (high - low)

    return scale(np.array(numbers)), [(float(scale(tick)), f"{tick:.3g}") for tick in ticks]


def draw_time(rows: Sequence[Row], groups: Sequence[Group]) -> Figure:
    """Updates a second over the training, and the seconds that training and evaluations took."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for group, color in zip(groups, colors_of(groups), strict=True):
        for number, run in enumerate(group.runs):
            steps = [line["step"] for line in run.metrics]
            rates = [line["time/updates_per_s"] for line in run.metrics]
            left.plot(steps, rates, color=color, alpha=0.8, label=group.label if number == 0 else None)
    left.set(xlabel="gradient updates", ylabel="updates a second")
    left.set_ylim(bottom=0)
    left.grid(alpha=0.25)
    _legend(figure, left)
    names, places = [row["run"] for row in rows], np.arange(len(rows))
    for offset, (key, label) in enumerate((("train_wall_s", "training"), ("evaluations_wall_s", "evaluations"))):
        right.barh(places + 0.4 * offset, [row[key] or 0 for row in rows], height=0.38, color=OKABE_ITO[offset],
                   label=label)  # fmt: skip
    right.set_yticks(places + 0.2, names, fontsize=8)
    right.invert_yaxis()
    right.set_xlabel("seconds (evaluations run beside the training, or within it)")
    right.legend(frameon=False)
    return figure


def draw_pendulum_traces(rollouts: Mapping[float, Rollouts]) -> Figure:
    """Angle and torque over one episode, for each target return."""
    figure = Figure(figsize=(10, 5), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    colors = colormaps["viridis"](np.linspace(0, 0.9, len(rollouts)))
    for (target, played), color in zip(rollouts.items(), colors, strict=True):
        seconds = PENDULUM_DT * np.arange(played.observations.shape[1])
        angles = np.degrees(np.arctan2(played.observations[0, :, 1], played.observations[0, :, 0]))
        label = f"asked {show_target(target)}, reached {played.returns[0]:.0f}"
        upper.plot(seconds, np.where(np.abs(np.diff(angles, append=angles[-1])) > 180, np.nan, angles), color=color)
        lower.plot(seconds, played.actions[0, :, 0], color=color, label=label, linewidth=1)
    upper.set(ylabel="angle from upright (degrees)", yticks=range(-180, 181, 90))
    lower.set(ylabel="torque (N m)", xlabel="time (s)")
    for axes in (upper, lower):
        axes.grid(alpha=0.25)
    _legend(figure, lower)
    return figure


def _legend(figure: Figure, axes: Any) -> None:
    """Beside the axes, so that it hides nothing, and in columns that fit."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), frameon=False, fontsize=8)

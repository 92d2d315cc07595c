"""The figures of a log: returns and lengths of episodes, values of columns, actions.

Legend: E episodes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from dt_ray.data.description.column_facts import sampled_rows
from dt_ray.data.description.log_description import LogDescription
from dt_ray.reports.figures import GREY, OKABE_ITO

BLUE, ORANGE = OKABE_ITO[:2]
MAX_BINS = 60
MAX_PANELS = 48  # columns whose values are drawn
PANELS_A_ROW = 4
MAX_POINTS = 20_000
MAX_MARKED = 12  # outliers with their number in a figure


def draw_episodes(log: LogDescription, labels: Sequence[str]) -> Figure:
    """Histograms of returns and lengths, and both of each episode; outliers are marked with their logged ids."""
    figure = Figure(figsize=(10, 7), layout="constrained")
    panels = figure.subplot_mosaic([["returns", "lengths"], ["each", "each"]], height_ratios=(1, 1.4))
    left, right, below = panels["returns"], panels["lengths"], panels["each"]
    for axes, values, name in ((left, log.returns, "return (sum of rewards)"), (right, log.lengths, "steps")):
        axes.hist(values, bins=min(MAX_BINS, max(5, len(values) // 5)), color=BLUE, alpha=0.85)
        for share in (0.5, 0.9):
            axes.axvline(np.quantile(values, share), color=ORANGE, linestyle="--", linewidth=1)
        axes.set(xlabel=f"{name} of an episode; dashed: median and 90%", ylabel="episodes")
    order = np.arange(len(log.returns))
    below.scatter(order, log.returns, s=8, color=GREY, linewidths=0, label="episode")
    marked = [each.episode for each in log.outliers]
    if marked:
        below.scatter(marked, log.returns[marked], s=26, color=ORANGE, linewidths=0, label="unlike the others")
        for place, label in list(zip(marked, labels, strict=True))[:MAX_MARKED]:
            below.annotate(label, (place, log.returns[place]), xytext=(3, 3), textcoords="offset points", fontsize=7)
    below.set(xlabel="episode, in the order of the log", ylabel="return (sum of rewards)")
    below.legend(frameon=False, fontsize=8)
    return figure


def draw_columns(log: LogDescription) -> Figure:
    """A histogram of each column over sampled steps."""
    rows = sampled_rows(log.features)
    rows = rows[:: max(1, len(rows) // MAX_POINTS)]
    shown = range(min(len(log.names), MAX_PANELS))
    num_lines = -(-len(shown) // PANELS_A_ROW)
    figure = Figure(figsize=(10, 0.4 + 1.9 * num_lines), layout="constrained")
    grid = np.ravel(figure.subplots(num_lines, PANELS_A_ROW, squeeze=False))
    for column, axes in zip(shown, grid, strict=False):
        axes.hist(rows[:, column], bins=40, color=BLUE, alpha=0.85)
        axes.set_title(log.names[column], fontsize=8)
        axes.set_yticks([])
        axes.tick_params(labelsize=7)
    for axes in grid[len(shown) :]:
        axes.set_axis_off()
    return figure


def draw_actions(log: LogDescription) -> Figure:
    """The values of each action against the return of the episode, which shows how good episodes act."""
    features = log.features
    first, num = features.observation_dim, min(features.action_dim, MAX_PANELS)
    num_lines = -(-num // PANELS_A_ROW)
    figure = Figure(figsize=(10, 0.5 + 2.4 * num_lines), layout="constrained")
    grid = np.ravel(figure.subplots(num_lines, PANELS_A_ROW, squeeze=False))
    ranks = np.argsort(np.argsort(features.returns)) / max(1, len(features.returns) - 1)
    actions = features.rows[:, :, first : first + num]
    keep = np.isfinite(actions).all(axis=2)
    every = max(1, int(keep.sum()) // MAX_POINTS)
    rank_of = np.broadcast_to(100 * ranks[:, None], keep.shape)[keep][::every]
    for i, axes in zip(range(num), grid, strict=False):
        counts, across, up = np.histogram2d(rank_of, actions[:, :, i][keep][::every], bins=(10, 30))
        axes.pcolormesh(across, up, (counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)).T, cmap="viridis")
        axes.set_title(log.names[first + i], fontsize=8)
        axes.tick_params(labelsize=7)
        axes.set_xlabel("rank of the return (%)", fontsize=7)
    for axes in grid[num:]:
        axes.set_axis_off()
    return figure

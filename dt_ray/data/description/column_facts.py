"""Facts about the columns of a log: ranges, constant columns, copies of other columns, use of the action bounds.

Legend: C columns (observations, actions, reward), R sampled steps.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from hashlib import blake2b

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from dt_ray.data.description.episode_features import EpisodeFeatures
from dt_ray.data.ranges import column_name
from dt_ray.data.transitions import TransitionDataset

ALIKE = 0.999999  # a larger correlation means that two columns are the same quantity in two units
MAX_COMPARED = 400  # columns; of a log with more, correlations are not computed
NUM_BINS = 20  # of the bounds of an action
FEWEST_STEPS = 1e-3  # share of the sampled steps; a bin with fewer counts as unused

Row = dict[str, str | int | float | None]


def column_names_of(data: TransitionDataset, columns: dict[str, str | None]) -> list[str]:
    """The names of observations, actions and the reward: those of the log where `data.columns` gives them."""
    return [
        column_name(kind, i, num, columns)
        for kind, num in (("observation", data.observations.shape[1]), ("action", data.actions.shape[1]))
        for i in range(num)
    ] + ["reward"]


@dataclass
class EqualColumns:
    """Finds columns with the same number at every step, part by part."""

    groups: list[int] = field(default_factory=list[int])  # of each column; equal ones have the same

    def add(self, data: TransitionDataset) -> None:
        columns = [*data.observations.T, *data.actions.T, data.rewards]
        digests = [blake2b(np.ascontiguousarray(column).tobytes(), digest_size=8).hexdigest() for column in columns]
        before = self.groups or [0] * len(columns)
        seen: dict[tuple[int, str], int] = {}
        self.groups = [seen.setdefault(key, len(seen)) for key in zip(before, digests, strict=True)]


def column_rows(features: EpisodeFeatures, names: list[str], groups: list[int]) -> list[Row]:
    """For each column its range, mean and spread over all steps, and what is odd about it."""
    weights = features.lengths / features.lengths.sum()
    mean = weights @ features.mean
    variance = weights @ (features.spread**2 + features.mean**2) - mean**2
    low, high = features.lowest.min(axis=0), features.highest.max(axis=0)
    rows = sampled_rows(features)
    quantiles = np.quantile(rows, [0.05, 0.5, 0.95], axis=0) if len(rows) else np.full((3, len(names)), np.nan)
    twins = _copied_columns(features, rows, names, groups)
    return [
        {
            "column": names[i],
            "lowest": float(low[i]),
            "5%": float(quantiles[0, i]),
            "median": float(quantiles[1, i]),
            "95%": float(quantiles[2, i]),
            "highest": float(high[i]),
            "mean": float(mean[i]),
            "std": float(np.sqrt(max(variance[i], 0.0))) if low[i] < high[i] else 0.0,
            "note": "the same at every step" if low[i] == high[i] else twins.get(i, ""),
        }
        for i in range(len(names))
    ]


def action_rows(
    features: EpisodeFeatures, names: list[str], bounds: tuple[Float[ndarray, "A"], Float[ndarray, "A"]] | None
) -> list[Row]:
    """For each action, how much of its bounds the log uses; the log's own range stands in for unknown bounds."""
    num = features.observation_dim
    acted = slice(num, num + features.action_dim)
    lowest, highest = features.lowest[:, acted].min(axis=0), features.highest[:, acted].max(axis=0)
    low, high = bounds if bounds is not None else (lowest, highest)
    actions = sampled_rows(features)[:, acted]
    limits = features.at_limit * (features.lengths / features.lengths.sum())[:, None]
    rows: list[Row] = []
    for i in range(features.action_dim):
        width = float(high[i] - low[i])
        margin = 1e-3 * width
        counts, _ = np.histogram(actions[:, i], bins=NUM_BINS, range=(low[i], high[i] if width > 0 else low[i] + 1))
        at_bound = (features.lowest[:, num + i] <= low[i] + margin) | (features.highest[:, num + i] >= high[i] - margin)
        rows.append(
            {
                "action": names[num + i],
                "bounds": f"{low[i]:.4g} .. {high[i]:.4g}",
                "range used": _share(highest[i] - lowest[i], width) if bounds is not None else None,
                "middle 90%": _share(
                    float(np.ptp(np.quantile(actions[:, i], [0.05, 0.95]))) if len(actions) else 0.0, width
                ),
                f"of {NUM_BINS} parts": int((counts > FEWEST_STEPS * max(1, len(actions))).sum()),
                "steps at a bound": f"{float(limits[at_bound, i].sum()):.1%}",
            }
        )
    return rows


def sampled_rows(features: EpisodeFeatures) -> Float[ndarray, "R C"]:
    rows = features.rows.reshape(-1, features.rows.shape[2])
    return rows[np.isfinite(rows).all(axis=1)].astype(np.float64)


def _share(part: float, width: float) -> str:
    return f"{part / width:.0%}" if width > 0 else "–"


def _copied_columns(
    features: EpisodeFeatures, rows: Float[ndarray, "R C"], names: list[str], groups: list[int]
) -> dict[int, str]:
    """For each column that is a copy of an earlier one, in the same or another unit, a note that says of which."""
    moves = features.lowest.min(axis=0) < features.highest.max(axis=0)
    twins: dict[int, str] = {}
    for i in range(len(names)):
        same = [j for j in range(i) if groups[j] == groups[i]]
        if same and moves[i]:
            twins[i] = f"the same as {names[same[0]]}"
    if len(rows) > 2 * len(names) and len(names) <= MAX_COMPARED:
        moving = np.flatnonzero(moves & (rows.std(axis=0) > 0))
        correlation = np.atleast_2d(np.corrcoef(rows[:, moving], rowvar=False))
        for place, i in enumerate(moving):
            like = np.flatnonzero(np.abs(correlation[place, :place]) > ALIKE)
            if len(like) and int(i) not in twins:
                twins[int(i)] = f"{names[moving[like[0]]]} in another unit"
    return twins

"""Models of what follows a step, the next observation and the reward, fitted by least squares to sampled steps.

Legend: E episodes, K sampled steps of each, R their steps in one list, C columns, F terms of a model, D what it
predicts, S observation dimension.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from dt_ray.data.description.episode_features import EpisodeFeatures
from dt_ray.data.description.outliers import DEVIATION

MAX_PRODUCTS = 14  # columns; a model of more has squares of columns, but no products of two
MAX_FITTED = 30_000  # steps that a model is fitted to
MAX_TERMS = 2**24  # numbers computed at once
RIDGE = 1e-4  # times the number of steps, added to the squares of each standardised term
NUM_FITS = 3  # each without the tenth of the episodes for which the fit before had the largest errors
KEPT_SHARE = 0.9
USUAL_SHARE = 0.75  # of the episodes have smaller errors than the usual one
FEWEST_STEPS = 5  # an episode with fewer is not judged
WIDEST = 6.0  # standard deviations, to which the inputs of a model are clipped
FACTORS = (180 / np.pi, 1000.0, 100.0, 10.0, 3.6, 2.54)  # degrees, milli, percent, …, km/h for m/s, inches for cm
EXPLAINED = 0.4  # a correction explains an error if it leaves less than this share of it
MAX_GUESSED = 24  # observations; with more, no correction is tried


@dataclass(frozen=True, kw_only=True)
class StepModel:
    """Predicts what follows a step."""

    center: Float[ndarray, "C"]
    scale: Float[ndarray, "C"]
    weights: Float[ndarray, "F D"]
    spread: Float[ndarray, "D"]  # robust standard deviation of what it predicts
    usual: Float[ndarray, "D"]  # three quarters of the episodes have smaller median errors; in `spread`

    def predict(self, inputs: Float[ndarray, "... C"]) -> Float[ndarray, "... D"]:
        """The predictions, divided by `spread`."""
        rows = inputs.reshape(-1, inputs.shape[-1])
        every = max(1, MAX_TERMS // len(self.weights))
        parts = [
            _terms(rows[begin : begin + every], self.center, self.scale) @ self.weights / self.spread
            for begin in range(0, len(rows), every)
        ]
        return np.concatenate(parts).reshape(*inputs.shape[:-1], -1)

    def errors(self, inputs: Float[ndarray, "... C"], outputs: Float[ndarray, "... D"]) -> Float[ndarray, "... D"]:
        """The errors of the predictions, divided by `spread`."""
        return outputs / self.spread - self.predict(inputs)


def fit_model(inputs: Float[ndarray, "E K C"], outputs: Float[ndarray, "E K D"]) -> StepModel | None:
    """A quadratic model of the outputs, fitted by ridge regression to most of the episodes; None: too few steps.

    Least trimmed squares in the manner of Rousseeuw and Van Driessen (2006), over episodes: fit, leave out the tenth of
    the episodes with the largest median error, and fit again.
    """
    is_there = np.isfinite(inputs).all(axis=2)
    num = int(is_there.sum())
    center, scale = _center_and_scale(inputs[is_there])
    num_terms = _terms(center[None], center, scale).shape[1]
    if num < 2 * num_terms or is_there.sum(axis=1).max() < FEWEST_STEPS:
        return None
    _, spread = _center_and_scale(outputs[is_there])
    keep, model = np.ones(len(inputs), bool), None
    every = max(1, num // min(MAX_FITTED, MAX_TERMS // num_terms))
    for _ in range(NUM_FITS):
        used = is_there & keep[:, None]
        terms = _terms(inputs[used][::every], center, scale)
        squares = terms.T @ terms + RIDGE * len(terms) * np.diag([0.0] + [1.0] * (num_terms - 1))
        weights = np.linalg.lstsq(squares, terms.T @ outputs[used][::every], rcond=None)[0]
        model = StepModel(center=center, scale=scale, weights=weights, spread=spread, usual=spread)
        typical = median_sizes(model, inputs, outputs)
        worst = np.nan_to_num(np.nanmax(typical, axis=1, initial=0.0), nan=np.inf)
        keep = worst <= np.quantile(worst, KEPT_SHARE)
        model = replace(model, usual=np.nanquantile(typical, USUAL_SHARE, axis=0))
    return model


def median_sizes(
    model: StepModel, inputs: Float[ndarray, "E K C"], outputs: Float[ndarray, "E K D"]
) -> Float[ndarray, "E D"]:
    """The median size of the errors of each episode; NaN where it has too few steps."""
    return over_steps(np.abs(model.errors(inputs, outputs)))


def over_steps(values: Float[ndarray, "E K D"]) -> Float[ndarray, "E D"]:
    """The median over each episode's sampled steps; NaN where it has fewer than `FEWEST_STEPS`."""
    result = np.full((len(values), values.shape[2]), np.nan)
    has_steps = np.isfinite(values).all(axis=2).sum(axis=1) >= FEWEST_STEPS
    if has_steps.any():
        result[has_steps] = np.nanmedian(values[has_steps], axis=1)
    return result


def dynamics_of(features: EpisodeFeatures) -> tuple[Float[ndarray, "E K C"], Float[ndarray, "E K S"]]:
    """Inputs: observations and actions. Outputs: the changes of the observations until the next step."""
    rows = features.rows.astype(np.float64)
    return rows[:, :, :-1], features.next_observations - rows[:, :, : features.observation_dim]


def rewards_of(features: EpisodeFeatures) -> tuple[Float[ndarray, "E K C"], Float[ndarray, "E K 1"]]:
    """Inputs: observations, actions and next observations. Output: the reward."""
    rows = features.rows.astype(np.float64)
    return np.concatenate([rows[:, :, :-1], features.next_observations], axis=2), rows[:, :, -1:]


def _terms(inputs: Float[ndarray, "... C"], center: ndarray, scale: ndarray) -> Float[ndarray, "... F"]:
    """1, the standardised columns, their squares, and, of few columns, the products of two."""
    values = np.clip((inputs - center) / scale, -WIDEST, WIDEST)
    one = np.ones((*values.shape[:-1], 1))
    if values.shape[-1] > MAX_PRODUCTS:
        return np.concatenate([one, values, values**2], axis=-1)
    first, second = np.triu_indices(values.shape[-1])
    return np.concatenate([one, values, values[..., first] * values[..., second]], axis=-1)


def _center_and_scale(values: Float[ndarray, "R C"]) -> tuple[Float[ndarray, "C"], Float[ndarray, "C"]]:
    """Medians, and robust standard deviations; plain ones, or 1, for columns that hardly ever change."""
    if len(values) > MAX_FITTED:
        values = values[:: len(values) // MAX_FITTED]
    center = np.median(values, axis=0) if len(values) else np.zeros(values.shape[1])
    robust = DEVIATION * np.median(np.abs(values - center), axis=0) if len(values) else np.zeros(values.shape[1])
    plain = values.std(axis=0) if len(values) else np.zeros(values.shape[1])
    scale = np.where(robust > 1e-3 * plain, robust, plain)
    return center, np.where(scale > 0, scale, 1.0)


def guess_mistake(
    model: StepModel, inputs: Float[ndarray, "K C"], changes: Float[ndarray, "K S"], names: Sequence[str]
) -> str | None:
    """The mistake in an episode whose correction makes it follow the dynamics of the others; None where none does.

    It tries swapped observations, an observation in another unit (`FACTORS`, or one over that), and actions of 0.
    """
    is_there = np.isfinite(inputs).all(axis=1)
    inputs, changes = inputs[is_there], changes[is_there]
    num = changes.shape[1]
    if not len(inputs) or num > MAX_GUESSED:
        return None
    after = inputs[:, :num] + changes

    def error(before: ndarray, after: ndarray) -> float:
        found = model.errors(before, after - before[:, :num]) / np.maximum(model.usual, 1e-3)
        return float(np.minimum(np.abs(np.median(np.abs(found), axis=0)), 1e3).mean())

    now = error(inputs, after)
    tried = {words: error(*put_right) for words, put_right in _corrections(inputs, after, names)}
    best = min(tried, key=lambda words: tried[words])
    return best if tried[best] < EXPLAINED * now else None


def _corrections(
    before: Float[ndarray, "K C"], after: Float[ndarray, "K S"], names: Sequence[str]
) -> Iterator[tuple[str, tuple[ndarray, ndarray]]]:
    num = after.shape[1]
    for one in range(num):
        for other in range(one):
            order = list(range(num))
            order[one], order[other] = other, one
            swapped = np.concatenate([before[:, :num][:, order], before[:, num:]], axis=1)
            yield f"{names[other]} and {names[one]} look swapped", (swapped, after[:, order])
        for times in (-1.0, *FACTORS, *(1 / factor for factor in FACTORS)):
            put_right, follows = before.copy(), after.copy()
            put_right[:, one] /= times
            follows[:, one] /= times
            yield f"{names[one]} looks multiplied by {times:.4g}", (put_right, follows)
    idle = before.copy()
    idle[:, num:] = 0
    yield "it moves as if all actions had been 0", (idle, after)

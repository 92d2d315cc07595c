"""Intervals of means: of episodes, and of training seeds."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from numpy import ndarray

NUM_BOOTSTRAP_SAMPLES = 10_000


def bootstrap_interval(values: Float[ndarray, "N"]) -> tuple[float, float]:
    """95% interval of the mean: percentiles over resamples with a fixed seed, widened for few values (Hesterberg 2015).

    Of n values that are normal (exponential) it holds the truth in 92% (87%) of cases at n = 5, 94% (90%) at 10, 95%
    (93%) at 20 and 95% (94%) at 50; percentiles that are not widened in 84% (79%) at n = 5.
    """
    from scipy.special import ndtr, stdtrit  # a third of a second, which workers don't wait for when they start

    num = len(values)
    draws = np.random.default_rng(0).integers(num, size=(NUM_BOOTSTRAP_SAMPLES, num))
    # The level at which a normal interval would be as wide as Student's with the unbiased variance.
    tail = 2.5 if num == 1 else 100 * ndtr(-stdtrit(num - 1, 0.975) * np.sqrt(num / (num - 1)))
    low, high = np.percentile(values[draws].mean(axis=1), [tail, 100 - tail])
    return float(low), float(high)


def student_interval(values: Float[ndarray, "seeds *any"]) -> Float[ndarray, "2 *any"]:
    """95% interval of the mean of a few independent values, such as those of training seeds (Student's t)."""
    from scipy.special import stdtrit

    values = np.asarray(values, np.float64)
    mean = values.mean(axis=0)
    half = stdtrit(len(values) - 1, 0.975) * values.std(axis=0, ddof=1) / np.sqrt(len(values))
    return np.stack([mean - half, mean + half])

"""Intervals hold the truth as often as they say, whatever it is that is independent."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dt_ray.reports.records import iqm, stratified_interval
from dt_ray.runs.intervals import bootstrap_interval

NUM_TRIALS = 200


@pytest.mark.parametrize("num_seeds", [2, 3, 5, 10])
@pytest.mark.parametrize("within", [10.0, 100.0])
def test_the_interval_of_the_interquartile_mean_covers_seeds_that_differ(num_seeds: int, within: float) -> None:
    """At 95%, 200 trials hold it 190 times, give or take 3; 0 is the middle of both distributions."""
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(NUM_TRIALS):
        seeds = generator.normal(scale=30, size=(num_seeds, 1))
        low, high = stratified_interval(seeds + generator.normal(scale=within, size=(num_seeds, 20)))
        covered += low <= 0 <= high
    assert covered / NUM_TRIALS >= (0.8 if num_seeds == 2 else 0.9)


@given(st.integers(2, 6), st.integers(0, 99))
def test_more_episodes_of_the_same_seeds_do_not_narrow_it(num_seeds: int, seed: int) -> None:
    returns = np.random.default_rng(seed).normal(scale=30, size=(num_seeds, 1))
    few, many = (np.repeat(returns, num, axis=1) for num in (4, 400))
    assert np.ptp(stratified_interval(few)) == pytest.approx(np.ptp(stratified_interval(many)), abs=1e-9)
    low, high = stratified_interval(few)
    assert low <= iqm(few) <= high


@pytest.mark.parametrize(("num", "least"), [(5, 0.88), (10, 0.9), (20, 0.91)])
def test_the_interval_of_a_mean_covers_it_with_few_values(num: int, least: float) -> None:
    generator = np.random.default_rng(0)
    intervals = [bootstrap_interval(generator.normal(size=num)) for _ in range(NUM_TRIALS)]
    assert np.mean([low <= 0 <= high for low, high in intervals]) >= least


def test_one_value_is_its_own_interval() -> None:
    assert bootstrap_interval(np.array([3.0])) == (3.0, 3.0)

"""Target returns beside what estimates from a log say about them."""

import math

from hypothesis import given
from hypothesis import strategies as st
from support.reports import make_offline_report

from dt_ray.runs.recommendations import check_target

returns = st.floats(-1e6, 1e6)


@given(returns, st.tuples(returns, returns).map(sorted))
def test_a_clipped_target_is_the_nearest_supported_one_and_is_warned_of_where_it_differs(
    asked: float, supported: list[float]
) -> None:
    low, high = supported
    report = make_offline_report(step=1, best_target=None, supported=(low, high))
    clipped, kept = (check_target(asked, report, clip=clip) for clip in (True, False))
    assert clipped.asked == kept.asked == kept.used == asked
    assert clipped.used == sorted((low, asked, high))[1]
    for each in (clipped, kept):
        assert (each.warning is None) == (low <= asked <= high)


@given(returns)
def test_nothing_is_said_of_max_nor_where_nothing_was_estimated(asked: float) -> None:
    report = make_offline_report(step=1, best_target=None, supported=(-2.0, -1.0))
    assert check_target(math.inf, report, clip=True).used == math.inf
    assert check_target(math.inf, report, clip=True).warning is None
    assert check_target(asked, None).warning is None

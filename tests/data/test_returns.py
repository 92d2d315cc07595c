import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.examples import make_episodes

from dt_ray.data import returns_to_go

lengths = st.lists(st.integers(1, 12), min_size=1, max_size=6)


@given(lengths, st.floats(0.05, 1))
def test_return_to_go_obeys_its_recursion(lengths: list[int], discount: float) -> None:
    data = make_episodes(lengths)
    to_go = returns_to_go(data.rewards, data.starts, discount=discount)
    last = set((data.ends - 1).tolist())
    for t, value in enumerate(to_go):
        tail = 0.0 if t in last else discount * to_go[t + 1]
        assert value == pytest.approx(data.rewards[t] + tail, abs=1e-4)


@given(lengths)
def test_first_return_to_go_is_the_episode_return(lengths: list[int]) -> None:
    data = make_episodes(lengths)
    np.testing.assert_allclose(returns_to_go(data.rewards, data.starts)[data.starts], data.episode_returns, atol=1e-4)


def test_returns_to_go_by_hand() -> None:
    rewards, starts = np.array([1.0, 2.0, 4.0, 8.0], np.float32), np.array([0, 3])
    np.testing.assert_array_equal(returns_to_go(rewards, starts), [7, 6, 4, 8])
    np.testing.assert_array_equal(returns_to_go(rewards, starts, discount=0.5), [3, 4, 4, 8])


def test_long_episodes_lose_no_precision() -> None:
    rewards = np.full(1_000_000, 0.1, np.float32)
    assert returns_to_go(rewards, np.array([0]))[0] == pytest.approx(100_000, rel=1e-6)

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.examples import make_episodes

from dt_ray.data import TransitionDataset
from dt_ray.errors import DataError

lengths = st.lists(st.integers(1, 9), min_size=1, max_size=8)


def columns(num: int) -> dict:
    return {"observations": np.zeros((num, 2)), "actions": np.zeros((num, 1)), "rewards": np.arange(num, dtype=float)}


def test_terminated_and_truncated_are_both_episode_boundaries() -> None:
    data = TransitionDataset(
        **columns(6),
        terminated=np.array([0, 1, 0, 0, 0, 0], dtype=bool),
        truncated=np.array([0, 0, 0, 1, 0, 0], dtype=bool),
    )
    assert data.starts.tolist() == [0, 2, 4]
    assert data.lengths.tolist() == [2, 2, 2]
    assert data.episode_returns.tolist() == [1, 5, 9]
    assert data.timesteps.tolist() == [0, 1, 0, 1, 0, 1]


def test_columns_of_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="actions has 5 rows but rewards has 6"):
        TransitionDataset(**{**columns(6), "actions": np.zeros((5, 1))}, starts=np.array([0]))


@pytest.mark.parametrize("starts", [[1], [0, 0], [0, 6], [0, 3, 2]])
def test_impossible_starts_are_refused(starts: list[int]) -> None:
    with pytest.raises(ValueError, match="starts must increase"):
        TransitionDataset(**columns(6), starts=np.array(starts))


def test_a_dataset_without_boundaries_is_refused() -> None:
    with pytest.raises(ValueError, match="give starts, or terminated and truncated"):
        TransitionDataset(**columns(3))


@given(lengths, st.floats(0, 0.9), st.integers(0, 5))
def test_a_split_shares_no_episode_and_loses_none(lengths: list[int], fraction: float, seed: int) -> None:
    data = make_episodes(lengths)
    if round(len(lengths) * fraction) == len(lengths):
        with pytest.raises(DataError, match="leaves none to train on"):
            data.split(fraction, seed=seed)
        return
    train, held_out = data.split(fraction, seed=seed)
    assert sorted([*train.episode_ids, *held_out.episode_ids]) == list(range(len(lengths)))
    for part in (train, held_out):
        for i, episode in enumerate(part.episode_ids):
            rows = slice(part.starts[i], part.ends[i])
            np.testing.assert_array_equal(
                part.observations[rows], data.observations[data.starts[episode] : data.ends[episode]]
            )

"""Episodes in several blocks are what they are in one, to the last bit, whatever lies where."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.datasets import assert_same
from support.examples import make_episodes
from support.models import SPEC

from dt_ray.data import Normalizer, TransitionDataset, blocks
from dt_ray.data.blocks import EpisodeBlocks
from dt_ray.data.normalizer import mean_and_std
from dt_ray.data.returns import find_tails, returns_to_go

lengths = st.lists(st.integers(1, 9), min_size=1, max_size=12)


def parted(data: TransitionDataset, chance: np.random.Generator) -> list[TransitionDataset]:
    edges = np.unique([0, *chance.integers(0, data.num_episodes + 1, size=3), data.num_episodes])
    return [data.select(range(begin, end)) for begin, end in zip(edges, edges[1:], strict=False)]


@given(lengths, st.integers(0, 99))
def test_episodes_are_taken_from_their_blocks_in_any_order(lengths: list[int], seed: int) -> None:
    chance = np.random.default_rng(seed)
    data = make_episodes(lengths)
    finals = np.where(chance.random((len(lengths), 1)) < 0.5, np.nan, chance.normal(size=(len(lengths), 3)))
    data = replace(data, final_observations=finals.astype(np.float32))
    episodes = chance.permutation(data.num_episodes)[: chance.integers(1, data.num_episodes + 1)]
    taken = EpisodeBlocks(parted(data, chance)).take(episodes)
    assert_same(taken, data.select(episodes))
    np.testing.assert_array_equal(taken.final_observations, data.select(episodes).final_observations)


@given(lengths, st.integers(0, 99), st.sampled_from([1.0, 1e9]))
def test_returns_of_parts_are_those_of_the_whole_to_the_last_bit(lengths: list[int], seed: int, largest: float) -> None:
    """Where one reward is huge each episode is summed by itself, in all parts alike."""
    data = make_episodes(lengths, seed=seed)
    data.rewards[seed % len(data.rewards)] *= largest
    parts = parted(data, np.random.default_rng(seed))
    tails = find_tails([(part.rewards, part.starts) for part in reversed(parts)])
    found = [returns_to_go(p.rewards, p.starts, tail=tail) for p, tail in zip(reversed(parts), tails, strict=True)]
    np.testing.assert_array_equal(np.concatenate(found[::-1]), returns_to_go(data.rewards, data.starts))


@pytest.mark.parametrize("dimension", [2, 3, 11])
def test_units_do_not_depend_on_how_the_rows_are_parted(dimension: int) -> None:
    rows = np.random.default_rng(0).normal(1000, 3, size=(5000, dimension)).astype(np.float32)
    whole = rows.mean(axis=0, dtype=np.float64), rows.std(axis=0, dtype=np.float64)
    parts = np.split(rows, [1, 700, 701, 4096])
    np.testing.assert_array_equal(mean_and_std(lambda: parts), whole)


def test_a_block_is_let_go_when_nothing_of_it_is_to_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "CHUNK_STEPS", 10)
    data = make_episodes([10] * 6)
    found = EpisodeBlocks([data.select([0, 1]), data.select([2, 3]), data.select([4, 5])])
    chunks = found.chunks(np.array([0, 2, 1, 3]))
    assert [chunk.tolist() for chunk in chunks] == [[0], [2], [1], [3]]
    held = [len(list(found)) for _ in found.consumed(chunks)]
    assert held == [3, 2, 2, 1]
    assert not list(found)


def test_the_units_of_a_dataset_are_fitted_on_all_of_it() -> None:
    data = make_episodes([30, 40], observation_dim=3, action_dim=2)
    fitted = Normalizer.fit(data, SPEC)
    np.testing.assert_allclose(fitted.observation_mean, data.observations.mean(axis=0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(fitted.observation_std, data.observations.std(axis=0), rtol=1e-5)

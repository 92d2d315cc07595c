from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.examples import make_episodes, write_episodes

from dt_ray.config.loading import load_config
from dt_ray.config.schema import RunConfig
from dt_ray.data import Normalizer, read_dataset
from dt_ray.data.logs.episodes import to_table
from dt_ray.data.spaces import SpaceSpec
from dt_ray.data.transitions import chosen_episodes
from dt_ray.errors import DataError
from dt_ray.play.collection import flatten
from dt_ray.training.resident import ResidentData, ResidentSource


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_ranks_share_the_batch_that_one_worker_draws(
    tiny_config: RunConfig, pendulum_spec: SpaceSpec, world_size: int
) -> None:
    data = ResidentData.build(make_episodes([9, 30, 12, 5, 7]), pendulum_spec, tiny_config)
    whole = ResidentSource(data, tiny_config).batch(5)
    parts = [ResidentSource(data, tiny_config, rank=r, world_size=world_size).batch(5) for r in range(world_size)]
    for name, expected in vars(whole).items():
        if name != "num_real":
            torch.testing.assert_close(torch.cat([getattr(part, name) for part in parts]), expected)
    # And each of them knows how many steps are real in all of them together.
    assert {float(batch.num_real) for batch in (whole, *parts)} == {float(whole.mask.sum())}


def test_return_noise_blurs_each_window_as_a_whole(tiny_config: RunConfig, pendulum_spec: SpaceSpec) -> None:
    data = ResidentData.build(make_episodes([30] * 20), pendulum_spec, tiny_config)
    config = replace(tiny_config, optim=replace(tiny_config.optim, batch_size=2000))
    noisy = replace(config, data=replace(config.data, return_noise=5.0))
    clean, blurred = (ResidentSource(data, each).batch(3) for each in (config, noisy))
    errors = (blurred.returns_to_go - clean.returns_to_go) / data.normalizer.return_scale
    torch.testing.assert_close(errors, errors[:, :1].expand_as(errors), atol=1e-4, rtol=1e-4)
    assert errors.std().item() == pytest.approx(5.0, rel=0.1)
    parts = [ResidentSource(data, noisy, rank=r, world_size=2).batch(3).returns_to_go for r in range(2)]
    torch.testing.assert_close(torch.cat(parts), blurred.returns_to_go)
    torch.testing.assert_close(blurred.observations, clean.observations)


def test_the_split_does_not_depend_on_the_order_of_episodes(tiny_config: RunConfig, pendulum_spec: SpaceSpec) -> None:
    data = make_episodes([9, 30, 12, 5, 7])
    shuffled = data.select([3, 0, 4, 2, 1])
    one, other = (ResidentData.build(each, pendulum_spec, tiny_config) for each in (data, shuffled))
    np.testing.assert_array_equal(one.train.rows, other.train.rows)


def test_the_model_sees_standardised_observations_and_actions_within_one(
    tiny_config: RunConfig, pendulum_spec: SpaceSpec
) -> None:
    data = make_episodes([50] * 10)
    train = ResidentData.build(data, pendulum_spec, tiny_config).train
    real = train.rows[np.any(train.rows != 0, axis=1)]
    np.testing.assert_allclose(real[:, :3].mean(axis=0), 0, atol=1e-4)
    np.testing.assert_allclose(real[:, :3].std(axis=0), 1, atol=1e-4)
    assert np.abs(train.rows[:, 3]).max() == pytest.approx(1, abs=0.01)
    assert np.abs(real[:, -1]).max() == pytest.approx(1, abs=1e-5)


def test_units_are_undone_exactly(pendulum_spec: SpaceSpec) -> None:
    data = make_episodes([50])
    normalizer = Normalizer.fit(data, pendulum_spec)
    back = normalizer.denormalize_actions(normalizer.normalize_actions(data.actions))
    np.testing.assert_allclose(back, data.actions, atol=1e-6)


def test_a_constant_observation_is_left_alone(pendulum_spec: SpaceSpec) -> None:
    data = make_episodes([50])
    data.observations[:, 1] = 7.0
    normalized = Normalizer.fit(data, pendulum_spec).normalize(data)
    np.testing.assert_allclose(normalized.observations[:, 1], 0)


def test_episodes_longer_than_the_timestep_table_are_refused(tiny_config: RunConfig, pendulum_spec: SpaceSpec) -> None:
    with pytest.raises(DataError, match=r"episode 1 has 61 steps .* set model.max_timesteps=61"):
        ResidentData.build(make_episodes([5, 61]), pendulum_spec, tiny_config)


def test_no_validation_fraction_means_no_validation(tiny_config: RunConfig, pendulum_spec: SpaceSpec) -> None:
    config = replace(tiny_config, data=replace(tiny_config.data, validation_fraction=0.0))
    source = ResidentSource(ResidentData.build(make_episodes([5, 6]), pendulum_spec, config), config)
    assert source.validation_batch(0) is None


@given(
    ids=st.lists(st.integers(0, 10**6), min_size=1, max_size=30, unique=True),
    max_episodes=st.none() | st.integers(1, 40),
    top_fraction=st.floats(0.01, 1),
    seed=st.integers(0, 99),
)
def test_the_best_of_the_first_episodes_are_chosen(
    ids: list[int], max_episodes: int | None, top_fraction: float, seed: int
) -> None:
    returns = np.random.default_rng(seed).normal(size=len(ids))
    chosen = chosen_episodes(np.array(ids), returns, max_episodes=max_episodes, top_fraction=top_fraction)
    first = sorted(range(len(ids)), key=ids.__getitem__)[:max_episodes]
    assert list(chosen) == sorted(chosen, key=lambda i: ids[i])
    assert len(chosen) / len(first) >= top_fraction > (len(chosen) - 1) / len(first)
    assert set(chosen) <= set(first)
    worst = min(returns[chosen])
    assert all(returns[i] <= worst for i in set(first) - set(chosen))


@given(num=st.integers(1, 1000), per_mille=st.integers(1, 1000))
def test_a_share_of_the_episodes_is_counted_exactly(num: int, per_mille: int) -> None:
    """0.07 of 100 episodes are 7: 0.07 * 100 is more than that in floats, and would be rounded up to 8."""
    chosen = chosen_episodes(np.arange(num), np.arange(num) * 1.0, max_episodes=None, top_fraction=per_mille / 1000)
    assert len(chosen) == -(-num * per_mille // 1000)


@given(st.permutations(range(12)), st.integers(1, 12))
def test_of_equal_returns_the_first_ones_of_the_log_are_chosen(order: list[int], num: int) -> None:
    """In whatever order the episodes were read."""
    returns = np.array([5.0] * 3 + [1.0] * 9)[order]
    chosen = chosen_episodes(np.array(order), returns, max_episodes=None, top_fraction=num / 12)
    assert np.array(order)[chosen].tolist() == list(range(num))


def test_logged_returns_to_go_are_used_unless_the_rewards_are_asked_for(tmp_path: Path, pendulum_spec) -> None:
    data = make_episodes([4, 6, 5])
    logged = replace(data, returns_to_go=np.arange(15, dtype=np.float32))
    config = load_config("decision_transformer/pendulum", ["data.validation_fraction=0", "data.collect=null"])

    def first_returns(path: Path, source: str | None) -> np.ndarray:
        settings = replace(config.data, path=str(path), return_source=source)
        built = ResidentData.build(read_dataset(settings), pendulum_spec, replace(config, data=settings))
        return built.train.rows[[1, 6, 13], -1] / built.normalizer.return_scale

    packed = write_episodes(logged, tmp_path / "packed.parquet")
    rows = flatten(to_table(data)).append_column("rtg", pa.array(logged.returns_to_go))
    pq.write_table(rows, flat := tmp_path / "flat.parquet")
    for path in (packed, flat):
        np.testing.assert_allclose(first_returns(path, None), [0, 4, 10], rtol=1e-5)
        np.testing.assert_allclose(first_returns(path, "column"), [0, 4, 10], rtol=1e-5)
        np.testing.assert_allclose(first_returns(path, "rewards"), data.episode_returns, rtol=1e-5)
    with pytest.raises(DataError, match="data.return_source=column, but the data has no column returns_to_go"):
        first_returns(write_episodes(data, tmp_path / "plain.parquet"), "column")


def test_each_dataset_of_a_mix_has_its_share_of_the_windows(
    tiny_config: RunConfig, pendulum_spec: SpaceSpec, tmp_path: Path
) -> None:
    for name, reward, lengths in (("good", 1.0, [10] * 3), ("bad", 0.0, [20] * 30)):
        data = make_episodes(lengths)
        write_episodes(replace(data, rewards=np.full_like(data.rewards, reward)), tmp_path / name / "part.parquet")
    mix = {str(tmp_path / "bad"): 1.0, str(tmp_path / "good"): 3.0}
    settings = replace(tiny_config.data, mix=mix, validation_fraction=0.0)
    config = replace(tiny_config, data=settings, optim=replace(tiny_config.optim, batch_size=400))
    source = ResidentSource(ResidentData.build(read_dataset(settings), pendulum_spec, config), config)
    batches = [source.batch(step) for step in range(20)]
    good = np.mean([(batch.returns_to_go[:, 0] > 0).float().mean() for batch in batches])
    assert good == pytest.approx(3 / 4, abs=0.02)
    far = replace(make_episodes([5]), episode_ids=np.array([2**60]))
    write_episodes(far, tmp_path / "bad" / "far.parquet")
    with pytest.raises(DataError, match="episode ids of datasets that are mixed must be 0..72057594037927935"):
        read_dataset(settings)
    (tmp_path / "bad" / "far.parquet").unlink()
    filtered = replace(config, data=replace(settings, top_fraction=0.05))
    with pytest.raises(DataError, match="no episode of .*bad is left to train on"):
        ResidentData.build(read_dataset(settings), pendulum_spec, filtered)


def test_a_single_dataset_may_have_any_episode_ids(tiny_config: RunConfig, pendulum_spec: SpaceSpec) -> None:
    data = replace(make_episodes([9, 30, 12, 5]), episode_ids=np.array([-3, 2**56, 10**18, 2**62]))
    built = ResidentData.build(data, pendulum_spec, tiny_config)
    assert built.train.num_transitions + (built.validation.num_transitions if built.validation else 0) == 56

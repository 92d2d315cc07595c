"""Implicit Q-learning learns from a step and what came next wherever the log tells it, and says where it does not."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pc
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.examples import make_episodes, tiny_overrides, write_episodes

from dt_ray.api import IQL
from dt_ray.config.loading import load_config
from dt_ray.config.schema import DataConfig, RunConfig
from dt_ray.data import Normalizer, TransitionDataset, read_dataset, slice_windows
from dt_ray.data.logs.files import find_files
from dt_ray.data.spaces import SpaceSpec
from dt_ray.data.transitions import join_episodes
from dt_ray.data.windows import WindowTable
from dt_ray.errors import DataError
from dt_ray.jobs.training import name_run, start_run
from dt_ray.models.actor_critic import Transitions
from dt_ray.models.batch import WindowBatch
from dt_ray.training.cutting import WindowCutter
from dt_ray.training.file_facts import FileFacts
from dt_ray.training.resident import ResidentData, ResidentSource
from dt_ray.training.stream_facts import StreamingData, cut_long
from dt_ray.training.streaming import StreamingSource

SPEC = SpaceSpec(observation_dim=3, action_dim=1, action_low=(-2.0,), action_high=(2.0,))


def episodes(lengths: Sequence[int], endings: Sequence[str], *, seed: int = 0) -> TransitionDataset:
    """Episodes that the environment ended, that were cut and followed by a known observation, or by a hidden one."""
    data = make_episodes(lengths, seed=seed)
    is_ended = np.array([ending == "ended" for ending in endings])
    finals = np.random.default_rng(seed + 1).normal(size=(len(lengths), 3)).astype(np.float32)
    finals[[ending == "hidden" for ending in endings]] = np.nan
    terminated, truncated = data.terminated.copy(), data.truncated.copy()
    terminated[data.ends - 1], truncated[data.ends - 1] = is_ended, ~is_ended
    return replace(data, terminated=terminated, truncated=truncated, final_observations=finals)


def iql_config(config: RunConfig, **settings: object) -> RunConfig:
    data = replace(config.data, validation_fraction=0.0, **settings)
    return replace(config, algorithm="iql", data=data, optim=replace(config.optim, batch_size=16))


endings = st.sampled_from(["ended", "followed", "hidden"])


@given(st.lists(st.tuples(st.integers(1, 6), endings), min_size=1, max_size=6), st.sampled_from([1.0, 0.9]))
@settings(max_examples=60)
def test_every_transition_has_the_successor_that_the_log_tells(log: list[tuple[int, str]], discount: float) -> None:
    lengths, kinds = zip(*log, strict=True)
    data = episodes(lengths, kinds)
    config = iql_config(RunConfig(), discount=discount)
    hidden = np.isin(np.arange(data.num_transitions), data.ends[[kind == "hidden" for kind in kinds]] - 1)
    if hidden.all():
        with pytest.raises(DataError, match="trains nothing"):
            ResidentData.build(data, SPEC, config)
        return
    resident = ResidentData.build(data, SPEC, config)
    source = ResidentSource(resident, config)
    places = source.train.find(np.arange(data.num_transitions)[None])
    found = Transitions.of(source.train.cut(places, 0), discount=discount)
    units = resident.normalizer
    np.testing.assert_allclose(found.rewards.numpy() / units.return_scale, data.rewards, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(found.is_known.numpy(), ~hidden)
    is_ended = np.isin(np.arange(data.num_transitions), data.ends[[kind == "ended" for kind in kinds]] - 1)
    np.testing.assert_array_equal(found.goes_on.numpy(), ~(hidden | is_ended))
    following = np.concatenate([data.observations[1:], np.zeros((1, 3), np.float32)])
    following[data.ends - 1] = data.final_observations
    goes_on = found.goes_on.numpy()
    expected = units.normalize_observations(following)[goes_on]
    np.testing.assert_array_equal(found.next_observations.numpy()[goes_on], expected)


@given(
    st.lists(st.tuples(st.integers(1, 6), endings), min_size=1, max_size=6), st.booleans(), st.sampled_from([1.0, 0.9])
)
@settings(max_examples=60)
def test_windows_in_the_logs_units_tell_what_came_next_as_a_table_does(
    log: list[tuple[int, str]], ends_with_seen: bool, discount: float
) -> None:
    """What `IQL.update` is given by `slice_windows` trains what the batches of a run train."""
    lengths, kinds = zip(*log, strict=True)
    data = episodes(lengths, kinds)
    if not ends_with_seen:
        data = replace(data, final_observations=None)
    normalizer = Normalizer.fit(data, SPEC, return_scale=1.0)
    anchors = np.arange(data.num_transitions)
    table = WindowTable.build(normalizer.normalize(data), length=2, discount=discount)
    cutter = WindowCutter(table, "cpu", seed=0, batch_size=len(anchors), share=slice(None))
    windows = WindowBatch.from_windows(slice_windows(data, anchors, length=2, discount=discount), normalizer)
    expected = Transitions.of(cutter.cut(cutter.find(anchors[None]), 0), discount=discount)
    found = Transitions.of(windows, discount=discount)
    for name in ("observations", "actions", "rewards", "goes_on", "is_known"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-4, atol=1e-4)
    going_on = found.goes_on
    torch.testing.assert_close(found.next_observations[going_on], expected.next_observations[going_on])


def test_an_update_learns_that_the_environment_ended_an_episode(tiny_config: RunConfig) -> None:
    """Of one-step episodes, values are learned where it is known that nothing came next, and only there."""
    losses = {}
    for kind in ("ended", "hidden"):
        data = episodes([1] * 8, [kind] * 8)
        model = IQL(iql_config(tiny_config, return_scale=1.0))
        losses[kind] = model.update(slice_windows(data, np.arange(8), length=2))["critic_loss"]
    assert losses["ended"] > 0
    assert losses["hidden"] == 0


def test_single_steps_train_the_values_that_whole_episodes_train(tmp_path: Path, tiny_config: RunConfig) -> None:
    """The same transitions, as episodes and as a dump of rows, give the same losses."""
    whole = episodes([7, 5, 9], ["ended", "followed", "followed"])
    following = np.concatenate([whole.observations[1:], np.zeros((1, 3), np.float32)])
    assert whole.final_observations is not None
    following[whole.ends - 1] = whole.final_observations
    dump = replace(
        whole,
        starts=np.arange(whole.num_transitions),
        episode_ids=np.arange(whole.num_transitions),
        truncated=~whole.terminated,
        final_observations=following,
    )
    losses = []
    config = iql_config(tiny_config, return_scale=1.0)
    for name, data in (("whole", whole), ("dump", dump)):
        path = str(write_episodes(data, tmp_path / f"{name}.parquet"))
        model = IQL(replace(config, data=replace(config.data, path=path)))
        source = ResidentSource(
            ResidentData.build(read_dataset(DataConfig(path=path)), model.learner.spec, model.config), config
        )
        batches = [source.batch(step) for step in range(5)]
        losses.append([float(model.learner.update(batch)["loss"]) for batch in batches])
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-3)


def test_a_plain_dump_of_transitions_trains_the_critics(tmp_path: Path) -> None:
    """Rows in their order, each with the observation that followed: the next row's, mostly."""
    data = make_episodes([40])
    rows = {f"obs_{i}": data.observations[:-1, i] for i in range(3)}
    rows |= {f"next_obs_{i}": data.observations[1:, i] for i in range(3)}
    rows |= {"action": data.actions[:-1, 0], "reward": data.rewards[:-1], "episode_id": np.arange(39)}
    pc.write_csv(pa.table(rows), tmp_path / "dump.csv")
    config = name_run(load_config("iql/pendulum_random", overrides_of(tmp_path, tmp_path / "dump.csv")), "iql")
    read = read_dataset(DataConfig(path=str(tmp_path / "dump.csv")))
    assert read.num_episodes == 39
    assert read.are_ends_known.all()
    source = ResidentSource(ResidentData.build(read, SPEC, config), config)
    assert Transitions.of(source.batch(0), discount=1.0).goes_on.all()
    assert start_run(config).summary["step"] == 3


def overrides_of(storage: Path, data: Path) -> list[str]:
    kept = [
        each for each in tiny_overrides(data, storage) if not each.startswith(("model", "total", "data.return_noise"))
    ]
    return [*kept, "model={num_layers: 1, width: 16, max_timesteps: 60}", "total_timesteps=3"]


@pytest.mark.parametrize("residency", ["resident", "streaming"])
def test_where_nothing_would_be_trained_it_is_said(residency: str, tmp_path: Path) -> None:
    data = make_episodes([1] * 20)
    file = write_episodes(data, tmp_path / "log/part.parquet")
    overrides = [*overrides_of(tmp_path, file.parent), f"data.residency={residency}"]
    config = name_run(load_config("iql/pendulum_random", overrides), "iql")
    with pytest.raises(DataError, match=r"trains nothing: iql learns values.*data.columns.next_observation=NAME"):
        start_run(config)
    assert not (tmp_path / "runs").exists()


def test_where_most_of_it_trains_little_it_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = write_episodes(make_episodes([1] * 20 + [3]), tmp_path / "log/part.parquet")
    overrides = [*overrides_of(tmp_path, file.parent), "data.validation_fraction=0"]
    with caplog.at_level(logging.WARNING, logger="dt_ray"):
        start_run(name_run(load_config("iql/pendulum_random", overrides), "iql"))
    assert "of 21 of 23 steps the log does not say what came next" in caplog.text


def test_streaming_knows_the_successors_too(tmp_path: Path, tiny_config: RunConfig) -> None:
    lengths, kinds = [1, 6, 3, 1, 8], ["followed", "hidden", "followed", "ended", "followed"]
    file = write_episodes(episodes(lengths, kinds), tmp_path / "log/part.parquet")
    config = iql_config(tiny_config, path=str(file.parent), residency="streaming")
    config = replace(config, optim=replace(config.optim, batch_size=4))
    files = find_files(config.data.path)
    source = StreamingSource(StreamingData.build(files, FileFacts(config, SPEC)), config)
    batches = [Transitions.of(source.batch(step), discount=1.0) for step in range(200)]
    known = torch.cat([batch.is_known for batch in batches]).float().mean()
    assert float(known) == pytest.approx(18 / 19, abs=0.02)


def test_pieces_of_a_long_episode_are_followed_by_one_another() -> None:
    data = episodes([25], ["followed"])
    data = replace(data, returns_to_go=data.to_go(1.0))
    parts = list(cut_long(data, 10))
    joined = join_episodes(parts)
    assert data.final_observations is not None
    assert joined.final_observations is not None
    expected = np.concatenate([data.observations[[10, 20]], data.final_observations])
    np.testing.assert_array_equal(joined.final_observations, expected)


def test_joining_keeps_what_some_parts_know() -> None:
    known, unknown = episodes([3, 2], ["followed", "ended"]), make_episodes([4])
    joined = join_episodes([known, unknown])
    assert joined.final_observations is not None
    np.testing.assert_array_equal(joined.final_observations[:2], known.final_observations)
    assert np.isnan(joined.final_observations[2]).all()

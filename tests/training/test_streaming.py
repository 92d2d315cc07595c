"""Data that streams gives the windows that resident data gives, each transition once a pass, from bounded pools."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.datasets import write_flat
from support.examples import make_episodes, write_episodes
from support.fitted import split_and_fit

from dt_ray.config.schema import RunConfig
from dt_ray.data import slice_windows
from dt_ray.data.logs.episodes import to_table
from dt_ray.data.logs.files import find_files
from dt_ray.data.spaces import SpaceSpec
from dt_ray.data.transitions import TransitionDataset
from dt_ray.errors import DataError
from dt_ray.jobs.training import resume_run, resumed_config, start_run
from dt_ray.runs.folder import RunFolder
from dt_ray.training import streaming
from dt_ray.training.preparing import streams
from dt_ray.training.stream_facts import StreamingData, episode_statistics
from dt_ray.training.streaming import StreamingSource

NUM_FILES, BATCH = 6, 7
POOL = 60  # transitions


@pytest.fixture
def data() -> TransitionDataset:
    lengths = np.random.default_rng(0).integers(1, 20, size=60).tolist()
    episodes = make_episodes([*lengths[:30], 200, *lengths[30:]])
    episodes.observations[:, 0] = np.arange(episodes.num_transitions)  # so that each tells which it is
    return episodes


@pytest.fixture
def config(tiny_config: RunConfig, data: TransitionDataset, tmp_path: Path, monkeypatch) -> RunConfig:
    """A configuration whose data streams from six files through pools of 60 transitions."""
    table = to_table(data)
    for i in range(NUM_FILES):
        rows = np.arange(i, data.num_episodes, NUM_FILES)
        (tmp_path / "data").mkdir(exist_ok=True)
        pq.write_table(table.take(pa.array(rows)), tmp_path / f"data/{i}.parquet")
    monkeypatch.setattr(streaming, "POOL_SHARE", POOL * 4 * 5 / 2**20)
    settings = replace(tiny_config.data, path=str(tmp_path / "data"), residency="streaming", memory_mb=1)
    model, optim = replace(tiny_config.model, max_timesteps=300), replace(tiny_config.optim, batch_size=BATCH)
    return replace(tiny_config, data=settings, model=model, optim=optim)


def build(config: RunConfig, spec: SpaceSpec) -> StreamingData:
    files = find_files(config.data.path)
    statistics = pa.concat_tables([episode_statistics(file, config, spec) for file in files])
    return StreamingData.build(files, statistics, spec, config)


def test_streaming_trains_on_the_episodes_and_in_the_units_of_resident_data(
    config: RunConfig, data: TransitionDataset, pendulum_spec: SpaceSpec
) -> None:
    best = replace(config.data, top_fraction=0.4, max_episodes=50)
    for settings in (config.data, best, replace(best, discount=0.9, validation_fraction=0.2)):
        chosen = replace(config, data=settings, model=replace(config.model, max_timesteps=250))
        train, _, normalizer = split_and_fit(data, pendulum_spec, chosen)
        built = build(chosen, pendulum_spec)
        np.testing.assert_array_equal(built.train_ids, train.episode_ids)
        assert built.num_transitions == train.num_transitions
        for name, value in vars(normalizer).items():
            np.testing.assert_allclose(getattr(built.normalizer, name), value, rtol=1e-5)


def test_a_pass_uses_each_transition_once_and_the_next_one_in_another_order(
    config: RunConfig, data: TransitionDataset, pendulum_spec: SpaceSpec
) -> None:
    source = StreamingSource(build(config, pendulum_spec), config)
    expected, _, normalizer = split_and_fit(data, pendulum_spec, config)
    passes = []
    for number in range(2):
        pieces = list(source._read_pass(number))
        assert max(piece.num_transitions for piece in pieces) <= POOL
        seen = np.concatenate([piece.observations[:, 0] for piece in pieces])
        assert len(seen) == expected.num_transitions
        wanted = normalizer.normalize(expected).observations[:, 0]
        np.testing.assert_allclose(np.sort(seen), np.sort(wanted), rtol=1e-5)
        passes.append(seen)
    assert (passes[0] != passes[1]).any()


def test_windows_of_pools_are_those_of_the_whole_data(
    config: RunConfig, data: TransitionDataset, pendulum_spec: SpaceSpec
) -> None:
    """But for those that reach past the end of a piece of a long episode."""
    train, _, normalizer = split_and_fit(data, pendulum_spec, config)
    whole = normalizer.normalize(train)
    source = StreamingSource(build(config, pendulum_spec), config)
    place_of = {round(float(value), 5): i for i, value in enumerate(whole.observations[:, 0])}
    num_whole, num_seen = 0, []
    for step in range(60):
        batch = source.batch(step)
        anchors = [place_of[round(float(value), 5)] for value in batch.observations[:, 0, 0]]
        num_seen += anchors
        windows = slice_windows(whole, np.array(anchors), length=config.window_length)
        np.testing.assert_array_equal(batch.timesteps[:, 0], windows.timesteps[:, 0])
        np.testing.assert_allclose(batch.returns_to_go[:, 0], windows.returns_to_go[:, 0], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(batch.observations[:, 0], windows.observations[:, 0], rtol=1e-4, atol=1e-5)
        num_whole += int((batch.mask.sum(dim=1).numpy() == windows.mask.sum(axis=1)).sum())
    assert num_whole >= len(num_seen) - 3 * 4 * 2  # pieces of the long episode cut at most so many windows short
    first = num_seen[: train.num_transitions - BATCH * 12]
    assert len(set(first)) > 0.95 * len(first)


def test_workers_read_different_files(config: RunConfig, data: TransitionDataset, pendulum_spec: SpaceSpec) -> None:
    built = build(config, pendulum_spec)
    seen = [
        {
            int(episode)
            for piece in StreamingSource(built, config, rank=rank, world_size=3)._read_pass(4)
            for episode in piece.episode_ids
        }
        for rank in range(3)
    ]
    assert sum(len(each) for each in seen) == len(set.union(*seen)) == len(built.train_ids)


def test_what_cannot_stream_is_refused_with_a_way_out(
    config: RunConfig, pendulum_spec: SpaceSpec, tmp_path: Path
) -> None:
    flat = write_flat(make_episodes([4, 5]), tmp_path / "flat", num_files=2)
    with pytest.raises(DataError, match=r"has a row per step; .*`python -m dt_ray.data import .*residency=resident"):
        streams(find_files(flat.path), config)
    scaling = replace(config.scaling, num_workers=7)
    with pytest.raises(DataError, match=r"6 file\(s\) to train on for 7 workers"):
        build(replace(config, scaling=scaling), pendulum_spec)
    short = replace(config, model=replace(config.model, max_timesteps=100))
    with pytest.raises(DataError, match=r"has 200 steps .* set model.max_timesteps=200, or model.clamp_timesteps=true"):
        start_run(replace(short, evaluation=replace(short.evaluation, max_timesteps=20)))


def test_residency_goes_by_what_the_data_takes_in_memory(
    config: RunConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Rows that are all alike: their file is a hundredth of what it decodes to."""
    episodes = make_episodes([1000] * 60)  # of 5 numbers a step: 1.14 MB
    alike = replace(episodes, observations=np.zeros_like(episodes.observations),
                    actions=np.zeros_like(episodes.actions), rewards=np.zeros_like(episodes.rewards))  # fmt: skip
    path = write_episodes(alike, tmp_path / "alike" / "0.parquet")
    assert path.stat().st_size < 50_000
    auto = replace(config, data=replace(config.data, path=str(path.parent), residency="auto", memory_mb=1))
    caplog.set_level("INFO", logger="dt_ray")
    assert streams(find_files(auto.data.path), auto)
    assert "data: 1 MB in memory, from 1 file(s), streaming (data.residency=auto, data.memory_mb=1)" in caplog.text
    assert not streams(find_files(auto.data.path), replace(auto, data=replace(auto.data, memory_mb=2)))


def test_the_workers_of_a_node_share_its_memory(config: RunConfig, pendulum_spec: SpaceSpec) -> None:
    built = build(config, pendulum_spec)
    alone, shared = (StreamingSource(built, config, workers_on_node=number).capacity for number in (1, 4))
    assert alone == POOL
    assert shared == POOL // 4


def test_a_streaming_run_trains_stops_and_goes_on(config: RunConfig) -> None:
    run = RunFolder.of(config)
    start_run(replace(config, total_timesteps=300, evaluation=replace(config.evaluation, every=0)))
    resume_run(resumed_config(str(run), ["total_timesteps=400"]))
    lines = [json.loads(line) for line in run.metrics_file.read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(5, 401, 5))
    assert np.mean([line["train/loss"] for line in lines[-10:]]) < np.mean([line["train/loss"] for line in lines[:10]])
    assert "validation/loss" in lines[-1]


def test_steps_past_the_timestep_table_share_its_last_row(tiny_config: RunConfig, tmp_path: Path) -> None:
    long = write_episodes(make_episodes([5000] * 6), tmp_path / "long.parquet")
    model = replace(tiny_config.model, clamp_timesteps=True)
    config = replace(tiny_config, model=model, data=replace(tiny_config.data, path=str(long)))
    assert start_run(config).summary["status"] == "finished"

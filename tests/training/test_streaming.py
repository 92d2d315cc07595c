"""Data that streams gives the windows that resident data gives, each transition once a pass, from bounded pools."""

import json
from dataclasses import replace
from itertools import takewhile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.datasets import write_flat
from support.examples import losses_of, make_episodes, write_episodes
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
from dt_ray.training import pools
from dt_ray.training.file_facts import FileFacts
from dt_ray.training.preparing import residency_of
from dt_ray.training.stream_facts import StreamingData, cut_long, lengths_cut_long
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
    monkeypatch.setattr(pools, "POOL_SHARE", POOL * 4 * 5 / 2**20)
    settings = replace(tiny_config.data, path=str(tmp_path / "data"), residency="streaming", memory_mb=1)
    model, optim = replace(tiny_config.model, max_timesteps=300), replace(tiny_config.optim, batch_size=BATCH)
    return replace(tiny_config, data=settings, model=model, optim=optim)


def build(config: RunConfig, spec: SpaceSpec) -> StreamingData:
    files = find_files(config.data.path)
    return StreamingData.build(files, FileFacts(config, spec))


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
        pieces = list(source._read(list(source._plan_pass(number))))
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
    sources = [StreamingSource(built, config, rank=rank, world_size=3) for rank in range(3)]
    seen = [
        {int(episode) for piece in source._read(list(source._plan_pass(4))) for episode in piece.episode_ids}
        for source in sources
    ]
    assert sum(len(each) for each in seen) == len(set.union(*seen)) == len(built.train_ids)


def test_what_cannot_stream_is_refused_with_a_way_out(
    config: RunConfig, pendulum_spec: SpaceSpec, tmp_path: Path
) -> None:
    flat = write_flat(make_episodes([4, 5]), tmp_path / "flat", num_files=2)
    with pytest.raises(DataError, match=r"has a row per step; .*`python -m dt_ray.data import .*residency=resident"):
        residency_of(find_files(flat.path), config)
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
    assert residency_of(find_files(auto.data.path), auto) == "streaming"
    assert "data: 1 MB in memory, from 1 file(s), streaming (data.residency=auto, data.memory_mb=1)" in caplog.text
    larger = replace(auto, data=replace(auto.data, memory_mb=2))
    assert residency_of(find_files(auto.data.path), larger) == "resident"


def test_the_workers_of_a_node_share_its_memory(config: RunConfig, pendulum_spec: SpaceSpec) -> None:
    built = build(config, pendulum_spec)
    alone, shared = (StreamingSource(built, config, workers_on_node=number).capacity for number in (1, 4))
    assert alone == POOL
    assert shared == POOL // 4


@pytest.mark.parametrize("changes", [{}, {"balance": 0.5}, {"return_noise": 3.0, "discount": 0.9}])
def test_a_batch_is_that_of_its_update_wherever_a_source_begins(
    config: RunConfig, pendulum_spec: SpaceSpec, changes: dict[str, float]
) -> None:
    config = replace(config, data=replace(config.data, **changes))
    built = build(config, pendulum_spec)
    for rank in range(2):
        place = {"rank": rank, "world_size": 2}
        source = StreamingSource(built, config, **place)
        batches = [source.batch(step) for step in range(300)]
        assert sum(1 for _ in takewhile(lambda pool: pool.first_step < 300, source._plan_pools())) > 8
        for begin in (1, 17, 18, 64, 150, 299):
            begun = StreamingSource(built, config, **place)
            for step in range(begin, min(begin + 30, 300)):
                for name, value in vars(begun.batch(step)).items():
                    torch.testing.assert_close(value, vars(batches[step])[name], rtol=0, atol=0)


@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=12), longest=st.integers(1, 50))
def test_how_episodes_are_cut_is_known_from_their_lengths(lengths: list[int], longest: int) -> None:
    data = make_episodes(lengths)
    pieces = list(cut_long(replace(data, returns_to_go=data.to_go()), longest))
    assert [piece.num_transitions for piece in pieces] == list(lengths_cut_long(data.lengths, longest))
    assert max(piece.num_transitions for piece in pieces) <= longest


def test_a_streaming_run_goes_on_as_if_it_had_never_stopped(config: RunConfig) -> None:
    config = replace(config, evaluation=replace(config.evaluation, every=0))
    whole, stopped = (replace(config, name=name, total_timesteps=num) for name, num in (("a", 400), ("b", 300)))
    whole = replace(whole, optim=replace(whole.optim, schedule="constant"))
    stopped = replace(stopped, optim=whole.optim)
    start_run(whole)
    start_run(stopped)
    resume_run(resumed_config(str(RunFolder.of(stopped)), ["total_timesteps=400"]))
    losses = losses_of(RunFolder.of(whole))
    assert losses_of(RunFolder.of(stopped)) == losses
    assert np.mean(losses[-10:]) < np.mean(losses[:10])
    assert "validation/loss" in json.loads(RunFolder.of(whole).metrics_file.read_text().splitlines()[-1])


def test_a_file_that_changes_while_it_streams_ends_the_run_by_its_name(
    config: RunConfig, pendulum_spec: SpaceSpec
) -> None:
    built = build(config, pendulum_spec)
    source = StreamingSource(built, config)
    for file in built.files:
        write_episodes(make_episodes([3]), Path(file.path))
    with pytest.raises(DataError, match=r"\d.parquet has other episodes than when the run began; .*--resume tiny"):
        list(source._read(list(source._plan_pass(0))))


def test_steps_past_the_timestep_table_share_its_last_row(tiny_config: RunConfig, tmp_path: Path) -> None:
    long = write_episodes(make_episodes([5000] * 6), tmp_path / "long.parquet")
    model = replace(tiny_config.model, clamp_timesteps=True)
    config = replace(tiny_config, model=model, data=replace(tiny_config.data, path=str(long)))
    assert start_run(config).summary["status"] == "finished"

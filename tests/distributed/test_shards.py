"""Ray Data reads, shuffles and shards a run's episodes: the same ones, in the same units, as any other residency."""

import runpy
import sqlite3
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import ray
from support import made
from support.examples import ROOT, losses_of, make_episodes, with_workers, write_episodes
from support.fitted import split_and_fit

from dt_ray.config.schema import RunConfig
from dt_ray.data import TransitionDataset, read_dataset
from dt_ray.data.logs.episodes import from_table, to_table
from dt_ray.data.spaces import SpaceSpec
from dt_ray.data.transitions import SOURCE_BITS
from dt_ray.distributed.functions import call_function
from dt_ray.distributed.preparing import SharedData, prepare_data
from dt_ray.errors import ConfigError, DataError
from dt_ray.jobs.training import check_run, resume_run, resumed_config, start_run
from dt_ray.play.collection import flatten
from dt_ray.runs.folder import RunFolder, checkpoint_at
from dt_ray.runs.storage import Folder
from dt_ray.training.resident import ResidentData
from dt_ray.training.stream_facts import lay_out

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

LENGTHS = [9, 30, 12, 5, 7, 21, 3, 14, 8, 40, 11, 6]


@pytest.fixture
def data() -> TransitionDataset:
    return make_episodes(LENGTHS)


@pytest.fixture
def config(tiny_config: RunConfig) -> RunConfig:
    """A run on two workers, on what `support.made.make` makes."""
    settings = replace(tiny_config.data, path="support.made:make", residency="dataset")
    return with_workers(tiny_config, 2, data=settings)


def blocks_of(shared: SharedData) -> list[TransitionDataset]:
    """The episodes of each block, in the order in which `ShardedData` numbers them."""
    tables = [table for shard in shared.shards for table in ray.get(shard.to_arrow_refs())]
    return [from_table(table, source="a block") for table in tables]


@pytest.mark.parametrize("rows", ["episodes", "steps"])
def test_a_functions_dataset_gives_the_episodes_and_units_of_a_file(
    rows: str, config: RunConfig, data: TransitionDataset, pendulum_spec: SpaceSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = to_table(data) if rows == "episodes" else flatten(to_table(data))
    edges = np.linspace(0, len(table), 6).astype(int).tolist()  # of blocks, which cut episodes of steps
    tables = [table.slice(begin, end - begin) for begin, end in zip(edges, edges[1:], strict=False)]
    monkeypatch.setattr(made, "TABLES", tables)
    shared = prepare_data(config, pendulum_spec)
    built, blocks = shared.fetch(), blocks_of(shared)
    train, _, normalizer = split_and_fit(data, pendulum_spec, config)
    assert [block.num_transitions for block in blocks] == built.lengths.tolist()
    for name, value in vars(normalizer).items():
        np.testing.assert_allclose(getattr(built.normalizer, name), value, rtol=1e-5)
    seen = {int(ids[0]): block.select([at]) for block in blocks for at, ids in enumerate(block.episode_ids[:, None])}
    assert sorted(seen) == train.episode_ids.tolist()
    expected = normalizer.normalize(replace(train, returns_to_go=train.to_go()))
    for at, episode in enumerate(train.episode_ids.tolist()):
        for name in ("observations", "actions", "rewards", "returns_to_go", "truncated"):
            mine = getattr(expected.select([at]), name)
            np.testing.assert_allclose(getattr(seen[episode], name), mine, rtol=1e-5, atol=1e-6, err_msg=name)


def test_two_workers_train_on_a_functions_dataset_and_a_resumed_run_goes_on(
    config: RunConfig, data: TransitionDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(made, "TABLES", [flatten(to_table(data))])
    start_run(replace(config, total_timesteps=10))
    run = RunFolder.of(config)
    result = resume_run(resumed_config(str(run), ["total_timesteps=20", "data.path=support.made:make"]))
    assert result.summary["status"] == "finished"
    assert np.isfinite(losses_of(run)).all()
    assert len(losses_of(run)) == 4


def test_a_small_functions_dataset_is_resident(
    config: RunConfig, data: TransitionDataset, pendulum_spec: SpaceSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(made, "TABLES", [to_table(data)])
    auto = replace(config, data=replace(config.data, residency="auto"))
    there = prepare_data(auto, pendulum_spec)
    train = split_and_fit(data, pendulum_spec, config)[0]
    assert not there.shards
    assert there.fetch().train.num_transitions == train.num_transitions


def test_the_datasets_of_a_mix_have_blocks_of_their_own(
    config: RunConfig, data: TransitionDataset, pendulum_spec: SpaceSpec, tmp_path: Path
) -> None:
    for name, episodes in (("a", range(7)), ("b", range(7, 12))):
        write_episodes(data.select(episodes), tmp_path / name / "0.parquet")
    mix = {str(tmp_path / "a"): 1.0, str(tmp_path / "b"): 2.0}
    shared = prepare_data(replace(config, data=replace(config.data, path="", mix=mix)), pendulum_spec)
    sources = [np.unique(block.episode_ids >> SOURCE_BITS).tolist() for block in blocks_of(shared)]
    assert sources == [[source] if length else [] for source, length in zip(
        shared.fetch().sources.tolist(), shared.fetch().lengths, strict=True)]  # fmt: skip
    assert [0] in sources
    assert [1] in sources


def test_learned_values_relabel_blocks_as_they_relabel_resident_data(
    config: RunConfig, tiny_config: RunConfig, pendulum_spec: SpaceSpec
) -> None:
    values = start_run(replace(tiny_config, name="values", algorithm="iql")).run
    settings = replace(tiny_config.data, return_source="value", values=str(checkpoint_at(Folder.at(values))))
    settings = replace(settings, max_episodes=10, top_fraction=0.8)
    here = ResidentData.build(read_dataset(settings, pendulum_spec), pendulum_spec, replace(config, data=settings))
    there = replace(config, data=replace(settings, residency="dataset"))
    shared = prepare_data(there, pendulum_spec)
    built, blocks = shared.fetch(), [block for block in blocks_of(shared) if block.num_episodes]
    assert built.values is not None
    assert here.values is not None
    for name, tensor in here.values.state_dict().items():
        np.testing.assert_allclose(built.values.state_dict()[name], tensor, rtol=1e-4, atol=1e-5, err_msg=name)
    assert built.lengths.sum() == here.train.num_transitions
    mine, theirs = (np.sort(table.rows, axis=0) for table in (lay_out(blocks, there), here.train))
    np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-5)


def test_the_example_reads_a_database(config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "examples")
    place = str(tmp_path / "log.sqlite")
    runpy.run_path(str(ROOT / "examples" / "log_in_a_database.py"))["main"](place)
    monkeypatch.setenv("LOG", place)
    settings = replace(config.data, path="log_in_a_database:read", action_bounds="data")
    run = replace(config, env_id=None, data=settings)
    built = prepare_data(run, check_run(run)).fetch()
    with sqlite3.connect(place) as database:
        (num_steps,) = database.execute("SELECT COUNT(*) FROM steps").fetchone()
    held_out = round(36 * settings.validation_fraction)
    assert built.lengths.sum() == num_steps - 40 * held_out


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("support.made:fail", "support.made:fail failed: ConnectionError: no database at 10.0.0.1"),
        ("support.made:make_nothing", "support.made:make_nothing returns a ray.data.Dataset, got list"),
        ("support.made:nowhere", "can't load 'support.made:nowhere'"),
        ("support.nowhere:make", "can't load 'support.nowhere:make'"),
    ],
)
def test_a_function_that_makes_no_dataset_is_refused(path: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call_function(path)


def test_an_empty_dataset_and_a_fault_in_a_row_are_one_message(
    config: RunConfig, data: TransitionDataset, pendulum_spec: SpaceSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DataError, match=r"support.made:break_down makes .* can't be read: ValueError: no such sensor"):
        prepare_data(replace(config, data=replace(config.data, path="support.made:break_down")), pendulum_spec)
    table = flatten(to_table(data))
    monkeypatch.setattr(made, "TABLES", [table.slice(0, 0)])
    with pytest.raises(DataError, match=r"support.made:make is empty"):
        prepare_data(config, pendulum_spec)
    rewards = table["reward"].to_numpy().copy()
    rewards[40] = np.nan
    at = table.column_names.index("reward")
    monkeypatch.setattr(made, "TABLES", [table.set_column(at, "reward", pa.array(rewards))])
    with pytest.raises(DataError, match=r"support.made:make can't be trained on.*\n.*episode 2"):
        prepare_data(config, pendulum_spec)

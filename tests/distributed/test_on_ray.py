"""The same data, the same batches, the same evaluations and the same errors on Ray as in one process."""

import json
import runpy
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from pyarrow import fs
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group
from support.datasets import assert_same, write_flat
from support.disturbed import ALGORITHM, DisturbedSpec, plan_fault
from support.examples import ROOT, losses_of, make_episodes, with_workers, write_episodes
from support.fitted import split_and_fit
from support.object_store import PLANTED, ObjectStore
from support.processes import wait_until

from dt_ray import train
from dt_ray.cli.data import main as run_data
from dt_ray.config.schema import DataConfig, RunConfig
from dt_ray.data import read_dataset, slice_windows
from dt_ray.data.logs.episodes import from_table
from dt_ray.data.spaces import SpaceSpec
from dt_ray.distributed.collect import collect_on_ray
from dt_ray.distributed.data import window_dataset
from dt_ray.distributed.evaluation import EvaluationActors, check_actors
from dt_ray.distributed.preparing import prepare_data
from dt_ray.errors import DataError, DivergedError, ResourceError
from dt_ray.jobs.training import resume_run, resumed_config, start_run
from dt_ray.play.collection import CollectionPlan, collect_here
from dt_ray.play.evaluation import evaluate
from dt_ray.runs.checkpoint import load_learner
from dt_ray.runs.folder import RunFolder, checkpoint_at
from dt_ray.runs.storage import Folder
from dt_ray.training.resident import ResidentData

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


def evaluations_of(config: RunConfig) -> dict[int, list[list[float]]]:
    """The returns of all episodes, for each target return of each evaluated update."""
    reports = RunFolder.of(config).read_evaluations()
    return {report.step: [target.episode_returns for target in report.targets] for report in reports}


@pytest.mark.parametrize("kind", ["episodes", "flat", "flat without ids", "flat, an episode a file"])
def test_ray_data_lays_out_what_one_process_reads(
    kind: str, tiny_config: RunConfig, pendulum_spec: SpaceSpec, tmp_path: Path
) -> None:
    data = make_episodes([9, 30, 12, 5, 7, 21, 3])
    if kind == "episodes":
        for i in range(7):
            write_episodes(data.select([i]), tmp_path / "data" / f"{i}.parquet")
    else:
        drop = ("episode_id", "timestep") if "without" in kind else ()
        parts = [data.select([i]) for i in range(7)] if "a file" in kind else [data]
        for i, part in enumerate(parts):
            write_flat(part, tmp_path / "data" / f"{i}", num_files=5 // len(parts) or 1, drop=drop)
    config = replace(tiny_config, data=replace(tiny_config.data, path=str(tmp_path / "data")))
    there = prepare_data(config, pendulum_spec).fetch()
    here = ResidentData.build(read_dataset(config.data, pendulum_spec), pendulum_spec, config)
    np.testing.assert_array_equal(there.train.rows, here.train.rows)
    np.testing.assert_array_equal(there.validation.rows, here.validation.rows)
    assert not there.train.rows.flags.writeable  # shared memory, mapped and not copied


def test_data_is_read_again_by_another_task_where_one_is_lost(
    tiny_config: RunConfig, pendulum_spec: SpaceSpec, tmp_path: Path
) -> None:
    fault = tmp_path / "fault"
    fault.touch()
    disturbed = prepare_data(tiny_config, DisturbedSpec(**asdict(pendulum_spec), fault=fault)).fetch()
    assert not fault.exists()
    whole = ResidentData.build(read_dataset(tiny_config.data, pendulum_spec), pendulum_spec, tiny_config)
    np.testing.assert_array_equal(disturbed.train.rows, whole.train.rows)


def test_a_fault_found_by_a_task_is_one_message(
    tiny_config: RunConfig, pendulum_spec: SpaceSpec, tmp_path: Path
) -> None:
    bad = make_episodes([4, 5])
    bad.rewards[6] = np.nan
    write_episodes(make_episodes([3]), tmp_path / "data" / "good.parquet")
    write_episodes(bad, tmp_path / "data" / "bad.parquet")
    config = replace(tiny_config, data=replace(tiny_config.data, path=str(tmp_path / "data")))
    with pytest.raises(DataError) as error:
        prepare_data(config, pendulum_spec)
    assert "bad.parquet" in str(error.value)
    assert "episode 1, step 2: rewards hold [nan]" in str(error.value)
    assert len(str(error.value).splitlines()) == 2  # what is wrong with which file, and where


def test_the_window_dataset_holds_every_window_of_its_split(tiny_config: RunConfig, pendulum_spec: SpaceSpec) -> None:
    data = read_dataset(tiny_config.data, pendulum_spec)
    train, validation = data.split(tiny_config.data.validation_fraction, seed=tiny_config.seed)
    for split, part in (("train", train), ("validation", validation)):
        windows = window_dataset(tiny_config, split=split)
        expected = slice_windows(part, np.arange(part.num_transitions), length=4)
        batch = windows.take_batch(10_000)
        for name in ("observations", "actions", "previous_actions", "returns_to_go", "timesteps", "mask"):
            np.testing.assert_array_equal(batch[name], getattr(expected, name), err_msg=name)


def test_the_window_dataset_has_the_episodes_that_are_trained_on(
    tiny_config: RunConfig, pendulum_spec: SpaceSpec
) -> None:
    settings = replace(tiny_config.data, max_episodes=10, top_fraction=0.3, validation_fraction=0.0)
    windows = window_dataset(replace(tiny_config, data=settings))
    data = read_dataset(settings, pendulum_spec).select(range(10))
    best = np.sort(data.episode_returns)[-3:].sum()
    batch = windows.take_batch(10_000)
    first = batch["timesteps"][:, 0] == 0
    assert first.sum() == 3
    np.testing.assert_allclose(batch["returns_to_go"][first, 0].sum(), best, rtol=1e-5)


@pytest.mark.parametrize("command", ["describe", "validate"])
def test_a_log_is_looked_through_by_tasks_as_by_one_process(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = write_flat(make_episodes([9, 30, 12, 5, 7, 21, 3]), tmp_path / "log", num_files=3).path
    printed = []
    for workers in ("2", "0"):
        run_data([command, log, "--workers", workers])
        printed.append(capsys.readouterr().out)
    assert "87" in printed[0]
    assert printed[0] == printed[1]


def test_a_log_is_imported_by_tasks_as_by_one_process(tmp_path: Path) -> None:
    data = make_episodes([9, 30, 12, 5, 7, 21, 3])
    source = write_flat(data, tmp_path / "log", num_files=3).path
    for out, workers in (("there", "2"), ("here", "0")):
        run_data(["import", source, "--out", str(tmp_path / out), "--workers", workers, "--env", "Pendulum-v1"])
    one, other = (read_dataset(DataConfig(path=str(tmp_path / name))) for name in ("there", "here"))
    order = np.argsort(one.episode_ids)
    assert_same(one.select(order), other)
    facts = pq.read_schema(next((tmp_path / "there").glob("*.parquet"))).metadata[b"dt_ray"]
    assert json.loads(facts) | {"env_id": "Pendulum-v1", "observation_dim": 3} == json.loads(facts)


def test_collected_episodes_do_not_depend_on_who_collects() -> None:
    plan = CollectionPlan(env_id="Pendulum-v1", behavior="mixed", num_episodes=230, seed=100_000, max_timesteps=10)
    here, there = list(collect_here(plan)), list(collect_on_ray(plan, num_workers=2))
    assert len(here) == 3
    assert all(left.equals(right) for left, right in zip(here, there, strict=True))


def test_workers_stream_files_of_their_own(tiny_config: RunConfig, tmp_path: Path, pendulum_spec: SpaceSpec) -> None:
    data = read_dataset(tiny_config.data)
    for i in range(4):
        write_episodes(data.select(range(3 * i, 3 * i + 3)), tmp_path / f"data/{i}.parquet")
    settings = replace(tiny_config.data, path=str(tmp_path / "data"), residency="streaming", memory_mb=1, discount=0.9)
    result = start_run(with_workers(tiny_config, 2, data=settings))
    assert result.summary["status"] == "finished"
    units = load_learner(checkpoint_at(Folder.at(result.run)))[0].normalizer
    _, _, expected = split_and_fit(data, pendulum_spec, replace(tiny_config, data=settings))
    np.testing.assert_array_equal(units.to_go_bounds, expected.to_go_bounds)


def test_workers_take_turns_at_a_run_as_if_they_were_one(tiny_config: RunConfig) -> None:
    """Three, two and no workers draw the same batches, play the same episodes and go on from each other's work."""
    model, optim = replace(tiny_config.model, dropout=0.0), replace(tiny_config.optim, schedule="constant")
    whole = replace(tiny_config, model=model, optim=optim)
    start_run(whole)
    parts = with_workers(replace(whole, total_timesteps=7), 3)
    start_run(parts)
    for num_workers, num_updates in ((2, 12), (0, 20)):
        settings = [f"scaling.num_workers={num_workers}", f"total_timesteps={num_updates}"]
        summary = resume_run(resumed_config(str(RunFolder.of(parts)), settings)).summary
        assert (summary["status"], summary["step"]) == ("finished", num_updates)
    steps = [json.loads(line)["step"] for line in RunFolder.of(parts).metrics_file.read_text().splitlines()]
    assert steps == [5, 7, 10, 12, 15, 20]
    curve = dict(zip(steps, losses_of(RunFolder.of(parts)), strict=True))
    np.testing.assert_allclose([curve[step] for step in (5, 10, 15, 20)], losses_of(RunFolder.of(whole)), rtol=1e-4)
    ours, reference = evaluations_of(parts), evaluations_of(whole)
    for step in (10, 20):
        np.testing.assert_allclose(ours[step], reference[step], rtol=1e-3)
    # The credentials that all of these processes hold are in no file, neither ours nor Ray Train's.
    files = [file for file in Path(str(RunFolder.of(parts))).rglob("*") if file.is_file()]
    assert len(files) > 10
    assert not [file for file in files for secret in PLANTED if secret.encode() in file.read_bytes()]


def test_workers_and_data_tasks_come_through_a_failing_store(
    tiny_config: RunConfig, object_store: ObjectStore, pendulum_data: Path, tmp_path: Path
) -> None:
    bucket = f"s3://bucket/{tmp_path.name}"
    fs.copy_files(str(pendulum_data), f"{bucket}/data")
    scaling = replace(tiny_config.scaling, cpus_per_worker=1)
    here = replace(tiny_config, scaling=scaling, total_timesteps=200)
    data = replace(here.data, path=f"{bucket}/data")
    there = with_workers(replace(here, storage_path=f"{bucket}/runs", data=data), 1)
    outages = ThreadPoolExecutor(1)
    start_run(here)

    def break_the_store() -> None:
        object_store.fail("500", num_requests=3)  # while the data is read
        wait_until(RunFolder.of(there).checkpoint_steps)
        object_store.fail("drop", num_requests=4)

    broken = outages.submit(break_the_store)
    assert start_run(there).summary["status"] == "finished"
    broken.result()
    assert losses_of(RunFolder.of(there)) == losses_of(RunFolder.of(here))


def test_a_plan_says_what_a_run_asks_of_the_cluster(capsys: pytest.CaptureFixture[str]) -> None:
    train.main(["--plan", "scaling.num_workers=2", "evaluation.num_actors=1", "scaling.cpus_per_worker=1.5"])
    printed = capsys.readouterr().out
    assert "2, 1.5 CPU(s) each" in printed
    assert "4 of 4 CPUs, 0 of 0 GPUs" in printed
    with pytest.raises(ResourceError, match="ask for 6 CPUs and there are 4"):
        train.main(["--plan", "scaling.num_workers=4", "scaling.cpus_per_worker=1.5"])


def test_actors_report_what_one_process_reports(tiny_config: RunConfig) -> None:
    from dt_ray.api import DecisionTransformer

    policy = DecisionTransformer(tiny_config).policy()
    settings = replace(tiny_config.evaluation, num_episodes=5)
    expected = evaluate(policy, "Pendulum-v1", settings, step=3).targets
    actors = EvaluationActors(EvaluationActors.start(2), "Pendulum-v1", settings)
    for target, reference in zip(actors.submit(policy, step=3).result().targets, expected, strict=True):
        np.testing.assert_allclose(target.episode_returns, reference.episode_returns, rtol=1e-4)


def test_more_actors_than_cpus_are_refused() -> None:
    with pytest.raises(ResourceError, match="9 evaluation actors need a CPU each and there are 4"):
        check_actors(9)


@pytest.mark.nightly
def test_a_diverged_run_stops_once_with_one_message(tiny_config: RunConfig, tmp_path: Path) -> None:
    """Ray Train would start the workers again; a loss that is no number will not get better by that."""
    run = with_workers(tiny_config, 1, optim=replace(tiny_config.optim, learning_rate=1e30, gradient_clip=None))
    with pytest.raises(DivergedError, match=r"the loss became (nan|inf) at update \d+"):
        start_run(run)


def test_flat_files_are_read_by_the_commands_settings(
    tiny_config: RunConfig, pendulum_spec: SpaceSpec, tmp_path: Path
) -> None:
    data = make_episodes([8, 9, 10])
    config = write_flat(data, tmp_path / "flat", num_files=2)
    rows = pq.read_table(f"{config.path}/000.parquet")
    assert "episode_id" in rows.column_names
    settings = replace(tiny_config.data, path=config.path, action_scale=0.5)
    laid_out = prepare_data(replace(tiny_config, data=settings), pendulum_spec).fetch()
    assert np.abs(laid_out.train.rows[:, 3]).max() <= 0.5


def test_the_windows_feed_another_trainer(pendulum_data: Path) -> None:
    example = ROOT / "examples" / "windows_for_another_trainer.py"
    first, last = runpy.run_path(str(example))["main"](str(pendulum_data), num_epochs=5)
    assert last < first


def test_a_checkpoint_named_from_here_collects_elsewhere(
    tiny_config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tasks have working directories of their own."""
    start_run(tiny_config)
    monkeypatch.chdir(tmp_path)
    plan = CollectionPlan(
        env_id="Pendulum-v1", behavior="runs/tiny", num_episodes=2, seed=100_000, max_timesteps=10, target_return=-50
    )
    (there,) = collect_on_ray(plan)
    (here,) = collect_here(plan)
    assert there["episode_id"].equals(here["episode_id"])
    np.testing.assert_allclose(from_table(there, source="").actions, from_table(here, source="").actions, atol=1e-4)


def test_a_run_that_loses_its_processes_ends_like_one_that_does_not(tiny_config: RunConfig) -> None:
    """Its worker, Ray Train's controller and an actor while it plays: losses and weights are the same bit for bit.

    What others have of the cluster, from before the run and from after its start, they still have.
    """
    scaling = replace(tiny_config.scaling, cpus_per_worker=1)  # as many threads on Ray as here
    settings = replace(tiny_config, total_timesteps=1500, scaling=scaling)
    settings = replace(settings, evaluation=replace(settings.evaluation, every=500))
    settings = replace(settings, checkpoint=replace(settings.checkpoint, every=100))
    start_run(settings)
    config = with_workers(settings, 1, algorithm=ALGORITHM)
    faults = [
        plan_fault(config, at=250),
        plan_fault(config, at=702, kills="ray::TrainController"),
        plan_fault(config, at=1001, kills="ray::EpisodePlayer"),
    ]
    others = [placement_group([{"CPU": 0.5}])]

    def come_later() -> None:
        wait_until(RunFolder.of(config).metrics_file.exists)
        others.append(placement_group([{"CPU": 0.5}]))

    with ThreadPoolExecutor(1) as another_user:
        came = another_user.submit(come_later)
        assert start_run(config).summary["status"] == "finished"
        came.result()
    assert not any(fault.exists() for fault in faults)
    assert [placement_group_table()[group.id.hex()]["state"] for group in others] == ["CREATED", "CREATED"]
    for group in others:
        remove_placement_group(group)
    run, whole = RunFolder.of(config), RunFolder.of(settings)
    steps = [json.loads(line)["step"] for line in run.metrics_file.read_text().splitlines()]
    assert steps == list(range(5, 1501, 5))
    assert losses_of(RunFolder.of(config)) == losses_of(RunFolder.of(settings))
    weights = [(each.checkpoint(1500) / "policy/model.safetensors").read_bytes() for each in (run, whole)]
    assert weights[0] == weights[1]
    ours, reference = evaluations_of(config), evaluations_of(settings)
    assert ours.keys() == reference.keys() == {500, 1000, 1500}
    for step, returns in reference.items():
        np.testing.assert_allclose(ours[step], returns, rtol=1e-3)


@pytest.mark.nightly
def test_an_elastic_run_takes_the_workers_there_is_room_for(tiny_config: RunConfig) -> None:
    config = replace(tiny_config, scaling=replace(tiny_config.scaling, num_workers=(1, 4), cpus_per_worker=1.5))
    assert start_run(config).summary["status"] == "finished"
    lines = RunFolder.of(config).metrics_file.read_text().splitlines()
    assert {json.loads(line)["time/workers"] for line in lines} == {2}

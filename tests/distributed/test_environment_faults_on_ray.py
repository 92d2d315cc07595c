"""An environment that fails on evaluation actors, in tasks or in trials ends in one message and exit code 2."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.environments import collect, config_of, env_id, settings_of
from support.examples import make_episodes, write_episodes
from support.folders import contents
from support.quirky_environments import FAULTY_STEP

from dt_ray.cli.command import run_command
from dt_ray.cli.data import main as data_main
from dt_ray.config.loading import to_plain
from dt_ray.config.schema import DataConfig, RunConfig
from dt_ray.data import read_dataset
from dt_ray.errors import BrokenEnvironmentError, RunError
from dt_ray.jobs.sweep import run_sweep
from dt_ray.jobs.training import name_run, resume_run, resumed_config, start_run
from dt_ray.runs.storage import Folder
from dt_ray.sweeps.folder import SweepFolder
from dt_ray.sweeps.loading import decode_sweep
from dt_ray.train import main as train_main

AXES = {"model.context_length": {"grid": [2, 3]}, "max_concurrent": 1}

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


@pytest.fixture(scope="module")
def tank_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "tank"
    collect("Plain", folder)
    return folder


def exit_of(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["train", *arguments])
    with pytest.raises(SystemExit) as ended:
        run_command(train_main)
    return ended.value.code, capsys.readouterr().err  # type: ignore[return-value]


@pytest.mark.parametrize("num_actors", [1, 0])
def test_a_fault_on_actors_or_in_tasks_is_told_before_the_training(
    num_actors: int, tank_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    on_ray = ["scaling.num_workers=1", f"evaluation.num_actors={num_actors}"]
    code, said = exit_of(settings_of(tank_data, tmp_path, "OldStep", *on_ray), monkeypatch, capsys)
    assert code == 2
    assert f"error: the environment {env_id('OldStep')} can't be played (seed 0, step 1)" in said
    assert said.count("can't be played") == 1
    assert "BrokenEnvironmentError" not in said  # as a traceback would name it
    assert not (tmp_path / "runs/OldStep").exists()


def test_a_fault_that_shows_later_on_actors_costs_no_training(
    tank_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    on_ray = ["scaling.num_workers=1", "evaluation.num_actors=1"]
    code, said = exit_of(settings_of(tank_data, tmp_path, "LostSimulator", *on_ray), monkeypatch, capsys)
    assert code == 2
    assert "checkpoints/step-00000004; but 2 evaluation(s) failed, the first after update 2: the environment " in said
    assert f"step {FAULTY_STEP}): step() raised RuntimeError: lost the simulator" in said
    assert "BrokenEnvironmentError" not in said
    assert json.loads((tmp_path / "runs/LostSimulator/summary.json").read_text())["status"] == "finished"


@pytest.mark.nightly
def test_a_refused_resume_on_ray_changes_nothing(tiny_config: RunConfig, tank_data: Path) -> None:
    config = replace(tiny_config, total_timesteps=5, scaling=replace(tiny_config.scaling, num_workers=1))
    run = Path(start_run(config).run)
    before = contents(run)
    for override in ("data.return_scale=0.5", "env_kwargs.colour=red"):
        with pytest.raises(Exception, match=r"was trained on other data than this|can't make the environment"):
            resume_run(resumed_config(str(run), ["total_timesteps=9", override]))
        assert contents(run) == before
    with pytest.raises(RunError):
        resume_run(resumed_config(str(run), ["total_timesteps=9", f"data.path={tank_data}x"]))
    assert resume_run(resumed_config(str(run), ["total_timesteps=7"])).summary["step"] == 7


@pytest.mark.nightly
def test_a_simulator_that_can_be_opened_once_is_played_on_one_actor(tank_data: Path, tmp_path: Path) -> None:
    def returns(name: str, *overrides: str) -> list:
        values = settings_of(tank_data, tmp_path, "Plain", "scaling.num_workers=1", f"name={name}", *overrides)
        config = name_run(config_of(values), name)
        return [target["episode_returns"] for target in start_run(config).summary["last"]["targets"]]

    one = returns("one", "evaluation.max_envs=1", "evaluation.num_actors=2")
    np.testing.assert_allclose(one, returns("many", "evaluation.num_actors=2"), rtol=1e-5)


def test_collecting_on_ray_opens_as_many_as_it_may(tmp_path: Path) -> None:
    collect("Plain", tmp_path / "here")
    options = ["--episodes", "8", "--workers", "2", "--max-envs", "1", "--out", str(tmp_path / "there")]
    data_main(["collect", "--env", env_id("Plain"), *options])
    here, there = (read_dataset(DataConfig(path=str(tmp_path / name))) for name in ("here", "there"))
    np.testing.assert_array_equal(here.observations, there.observations)


def test_a_sweep_tells_an_environments_fault_before_its_trials_or_of_each(tank_data: Path, tmp_path: Path) -> None:
    def sweep_of(name: str):
        config = config_of(settings_of(tank_data, tmp_path, name))
        config = replace(config, scaling=replace(config.scaling, num_workers=1, cpus_per_worker=1))
        return decode_sweep(AXES, to_plain(config), (), default_name=name)

    with pytest.raises(BrokenEnvironmentError, match="OldStep-v0 can't be played"):
        run_sweep(sweep_of("OldStep"))
    assert not SweepFolder.of(sweep_of("OldStep")).folder.exists()
    assert run_sweep(sweep_of("LostSimulator")) is None
    folder = SweepFolder.of(sweep_of("LostSimulator"))
    for name in folder.trial_names():
        told = (folder.trial(name).folder / "error.txt").read_text()
        assert "the training is finished, its checkpoint is" in told
        assert f"step {FAULTY_STEP}): step() raised RuntimeError: lost the simulator" in told


def test_a_sweep_goes_on_where_its_folder_and_its_data_are_now(tank_data: Path, tmp_path: Path) -> None:
    shutil.copytree(tank_data, tmp_path / "data")
    values = settings_of(tmp_path / "data", tmp_path, "Plain", "scaling.num_workers=1", "scaling.cpus_per_worker=1")
    config = to_plain(config_of(values))
    sweep = decode_sweep(AXES, config, (), default_name="Plain")
    best = run_sweep(sweep)
    assert best is not None
    place = tmp_path / "elsewhere/moved"
    place.parent.mkdir()
    Path(str(SweepFolder.of(sweep))).rename(place)
    (tmp_path / "data").rename(tmp_path / "moved")
    other = make_episodes([9] * 6, observation_dim=2)
    write_episodes(replace(other, actions=other.actions / 2), tmp_path / "other.parquet")
    before = contents(place)
    with pytest.raises(RunError, match="was trained on other data"):
        run_sweep(SweepFolder(Folder.at(place)).read([f"data.path={tmp_path}/other.parquet"]), resume=True)
    assert contents(place) == before
    again = run_sweep(SweepFolder(Folder.at(place)).read([f"data.path={tmp_path}/moved"]), resume=True)
    assert again is not None
    assert again["return_mean"] == best["return_mean"]
    assert again["checkpoint"].startswith(str(place))
    assert SweepFolder(Folder.at(place)).read().base.data.path == f"{tmp_path}/moved"

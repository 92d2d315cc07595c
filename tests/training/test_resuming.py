"""A resume that is refused leaves the run as it was; one that is not says where things are now."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from support.examples import make_episodes, write_episodes
from support.folders import contents

from dt_ray.config.loading import to_plain
from dt_ray.config.schema import RunConfig
from dt_ray.errors import ConfigError, RunError, UserError
from dt_ray.jobs.training import resume_run, resumed_config, start_run
from dt_ray.runs.storage import Folder
from dt_ray.sweep import main as sweep_main
from dt_ray.sweeps.folder import SweepFolder
from dt_ray.sweeps.loading import decode_sweep
from dt_ray.train import main as train_main


@pytest.fixture
def run(tiny_config: RunConfig) -> Path:
    return Path(start_run(replace(tiny_config, total_timesteps=5)).run)


def refused(tmp_path: Path) -> dict[str, list[str]]:
    other = make_episodes([30] * 4)
    other.observations[:] *= 50
    write_episodes(other, tmp_path / "other.parquet")
    write_episodes(make_episodes([30] * 4, observation_dim=4), tmp_path / "wider.parquet")
    return {
        "other data": [f"data.path={tmp_path}/other.parquet"],
        "data of other dimensions": [f"data.path={tmp_path}/wider.parquet"],
        "no data": [f"data.path={tmp_path}/nowhere"],
        "another model": ["model.width=32"],
        "another scale": ["data.return_scale=0.5"],
        "other bounds": ["data.action_bounds=[[-1],[1]]", "data.out_of_bounds=clip"],
        "an environment without these arguments": ["env_kwargs.colour=red"],
        "a dataset of no episodes left": ["data.validation_fraction=0.99"],
        "another name": ["name=other"],
        "another place": ["storage_path=elsewhere"],
        "an unknown key": ["optim.rate=1"],
    }


def test_a_refused_resume_changes_nothing(run: Path, tmp_path: Path) -> None:
    before = contents(run)
    for name, overrides in refused(tmp_path).items():
        with pytest.raises(UserError):
            train_main(["--resume", str(run), "total_timesteps=9", *overrides])
        assert contents(run) == before, name
    train_main(["--resume", str(run), "total_timesteps=7"])
    assert json.loads((run / "summary.json").read_text())["step"] == 7


def test_a_place_given_on_resume_is_stored_absolute(
    run: Path, tiny_config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny_config.data.path, tmp_path / "copy")
    monkeypatch.chdir(tmp_path)
    train_main(["--resume", str(run), "data.path=copy", "total_timesteps=6"])
    monkeypatch.chdir("/")
    assert resumed_config(str(run)).data.path == str(tmp_path / "copy")
    train_main(["--resume", str(run), "total_timesteps=7"])


def test_a_run_whose_data_was_moved_asks_where_to(tmp_path: Path, tiny_config: RunConfig) -> None:
    shutil.copytree(tiny_config.data.path, tmp_path / "data")
    config = replace(tiny_config, total_timesteps=5, data=replace(tiny_config.data, path=str(tmp_path / "data")))
    run = start_run(config).run
    (tmp_path / "data").rename(tmp_path / "moved")
    with pytest.raises(RunError, match=r"trained with .*/data, which is not there; .*--resume .* data.path=PLACE"):
        resume_run(resumed_config(run, ["total_timesteps=6"]))
    resume_run(resumed_config(run, ["total_timesteps=6", f"data.path={tmp_path}/moved"]))


def test_a_run_goes_on_where_its_folder_is_now(run: Path, tmp_path: Path) -> None:
    run.rename(tmp_path / "moved")
    train_main(["--resume", str(tmp_path / "moved"), "total_timesteps=6"])
    assert json.loads((tmp_path / "moved/summary.json").read_text())["step"] == 6
    assert not run.exists()


def test_a_moved_sweep_is_told_where_its_data_is_and_nothing_else(tiny_config: RunConfig, tmp_path: Path) -> None:
    sweep = decode_sweep({"model.context_length": {"grid": [2, 3]}}, to_plain(tiny_config), (), default_name="tiny")
    SweepFolder.of(sweep).create(sweep)
    place = tmp_path / "there/moved"
    place.parent.mkdir()
    Path(str(SweepFolder.of(sweep))).rename(place)
    text = (place / "sweep.yaml").read_text()
    read = SweepFolder(Folder.at(place)).read([f"data.path={tmp_path}/data", "max_concurrent=1"])
    assert (read.base.storage_path, read.base.name) == (str(place.parent), "moved")
    assert (read.base.data.path, read.settings.max_concurrent) == (f"{tmp_path}/data", 1)
    assert read.trials() == sweep.trials()
    with pytest.raises(ConfigError, match=r"a resumed sweep keeps its optim.learning_rate; it takes data.path"):
        sweep_main(["--resume", str(place), "optim.learning_rate=1"])
    with pytest.raises(RunError, match=r"which is not there; if it was moved, .*data.path=PLACE"):
        sweep_main(["--resume", str(place), f"data.path={tmp_path}/nowhere"])
    assert (place / "sweep.yaml").read_text() == text

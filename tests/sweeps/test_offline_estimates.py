"""A sweep without an environment whose best trial is chosen by estimates from the log alone."""

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.examples import make_episodes, write_episodes

from dt_ray import evaluate
from dt_ray.config.schema import RunConfig
from dt_ray.jobs.deriving import resolve_settings
from dt_ray.jobs.sweep import estimate_trials, run_sweep, write_results
from dt_ray.jobs.training import start_run
from dt_ray.offline import estimates
from dt_ray.sweeps.config import SweepConfig
from dt_ray.sweeps.folder import SweepFolder
from dt_ray.sweeps.loading import load_sweep


def resolve(tree: Mapping[str, Any]) -> RunConfig:
    return resolve_settings(tree).config


def hardly_trained(folder: Path, monkeypatch: pytest.MonkeyPatch) -> SweepConfig:
    """A sweep of two widths, whose estimates are believed although its world model has hardly been trained."""
    monkeypatch.setattr(estimates, "MAX_HALF_WIDTH", math.inf)
    monkeypatch.setattr(estimates, "MAX_DISAGREEMENT", math.inf)
    monkeypatch.setattr(estimates, "MAX_FRAGILITY", math.inf)
    log = write_episodes(make_episodes(list(range(5, 45)), action_dim=2), folder / "hall.parquet")
    settings = [f"data.path={log}", f"storage_path={folder}", "name=swept", "total_timesteps=20", "model.num_layers=1"]
    settings += ["optim.batch_size=8", "scaling.num_workers=0", "metric=offline_estimate", "evaluation.every=0"]
    swept = ["model.context_length=4", "model.width={grid: [8, 16]}", "max_concurrent=1"]
    return load_sweep(None, None, [*settings, *swept], resolve=resolve)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_ray_tune_runs_trials_that_are_compared_when_all_have_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = hardly_trained(tmp_path, monkeypatch)
    scaling = replace(sweep.base.scaling, num_workers=1, cpus_per_worker=1)
    best = run_sweep(replace(sweep, base=replace(sweep.base, scaling=scaling)))
    assert best is not None
    assert best["metric"] == "offline_estimate"
    assert math.isfinite(best["metric_mean"])
    assert "offline_estimate" in (tmp_path / "swept/trials.csv").read_text().splitlines()[0]


def test_the_best_trial_has_the_highest_estimate_in_one_world_model_of_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = hardly_trained(tmp_path, monkeypatch)
    folder = SweepFolder.of(sweep)
    folder.create(sweep)
    for name, chosen in sweep.trials().items():
        start_run(sweep.run_config(name, chosen, storage_path=str(folder.trials)))
    estimate_trials(sweep, folder, verbose=False)
    best = write_results(sweep, folder)
    assert best is not None
    found = {name: folder.trial(name).read_offline(20) for name in folder.trial_names()}
    scores = {name: report.score for name, report in found.items() if report is not None and report.score is not None}
    assert len(scores) == 2
    assert best["trial"] == max(scores, key=lambda name: scores[name])
    assert best["metric_mean"] == max(scores.values())
    assert best["command"].endswith("--offline")
    names = folder.trial_names()
    evaluate.main([best["checkpoint"], "--offline"])  # as the command says
    assert folder.trial_names() == names
    assert (tmp_path / "swept-world").is_dir()
    assert len({report.world_model for report in found.values() if report is not None}) == 1
    assert json.loads((folder.folder / "best.json").read_text())["settings"] == {
        "model.width": best["settings"]["model.width"]
    }

"""A sweep without an environment whose best trial is chosen by estimates from the log alone."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from support.examples import make_episodes, write_episodes

from dt_ray import evaluate
from dt_ray.config.schema import RunConfig
from dt_ray.jobs.deriving import resolve_settings
from dt_ray.jobs.sweep import estimate_trials, write_results
from dt_ray.jobs.training import start_run
from dt_ray.offline import estimates
from dt_ray.sweeps.folder import SweepFolder
from dt_ray.sweeps.loading import load_sweep


def resolve(tree: Mapping[str, Any]) -> RunConfig:
    return resolve_settings(tree).config


def test_the_best_trial_has_the_highest_estimate_in_one_world_model_of_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimates, "MAX_HALF_WIDTH", math.inf)  # of a world model that has hardly been trained
    monkeypatch.setattr(estimates, "MAX_DISAGREEMENT", math.inf)
    log = write_episodes(make_episodes(list(range(5, 45)), action_dim=2), tmp_path / "hall.parquet")
    settings = [
        f"data.path={log}",
        f"storage_path={tmp_path}",
        "name=swept",
        "total_timesteps=20",
        "model.num_layers=1",
    ]
    settings += ["optim.batch_size=8", "scaling.num_workers=0", "metric=offline_estimate", "evaluation.every=0"]
    sweep = load_sweep(
        None, None, [*settings, "model.context_length=4", "model.width={grid: [8, 16]}"], resolve=resolve
    )
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

"""Sweeps on Ray Tune: trials are plain runs, whoever stops, kills or searches them."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import ray
from support.disturbed import ALGORITHM, plan_fault
from support.examples import losses_of
from support.processes import wait_until

from dt_ray.config.loading import to_plain
from dt_ray.config.schema import RunConfig
from dt_ray.distributed import tuning
from dt_ray.errors import ConfigError, ResourceError
from dt_ray.jobs.sweep import run_sweep
from dt_ray.jobs.training import start_run
from dt_ray.runs.checkpoint import checkpoint_fault
from dt_ray.runs.folder import RunFolder
from dt_ray.sweeps.config import SweepConfig
from dt_ray.sweeps.folder import SweepFolder, result_of
from dt_ray.sweeps.loading import decode_sweep
from dt_ray.sweeps.tables import read_rows

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


def sweep_of(tiny_config: RunConfig, tmp_path: Path, name: str, *overrides: str, **axes: dict) -> SweepConfig:
    """Its trials follow one another in one process, which imports everything once, unless `max_concurrent` is given."""
    config = to_plain(tiny_config) | {"name": name, "storage_path": str(tmp_path / "sweeps")}
    config["scaling"]["num_workers"] = 1
    tree = {key.replace("__", "."): value for key, value in axes.items()}
    one_after_another = ("max_concurrent=1", "scaling.cpus_per_worker=1")
    return decode_sweep(tree, config, (*one_after_another, *overrides), default_name=name)


def statuses_of(sweep: SweepConfig) -> list[str]:
    folder = SweepFolder.of(sweep)
    return [result_of(folder.trial(name))[0] for name in folder.trial_names()]


def test_a_trial_is_the_run_that_its_configuration_gives(tiny_config: RunConfig, tmp_path: Path) -> None:
    """Bit for bit, though its data was laid out once for all, for longer windows. Resumed, it trains nothing again."""
    sweep = sweep_of(
        tiny_config,
        tmp_path,
        "plain",
        "num_seeds=2",
        model__context_length={"grid": [4, 2]},
        evaluation__target_returns={"grid": [-100, -300, -500]},
        evaluation__context_length={"grid": [2, 1]},
    )
    best = run_sweep(sweep)
    folder = SweepFolder.of(sweep)
    assert statuses_of(sweep) == ["finished"] * 4
    for name in folder.trial_names():
        config = folder.trial(name).read_config()
        scaling = replace(config.scaling, num_workers=0, cpus_per_worker=1)
        alone = replace(config, storage_path=str(tmp_path / "alone"), scaling=scaling)
        start_run(alone)
        assert losses_of(RunFolder.of(alone)) == losses_of(folder.trial(name))
    rows = read_rows(sweep, folder)
    assert len(rows) == 4 * 2 * 3
    assert (folder.folder / "trials.csv").read_text().count("\n") == 1 + len(rows)
    assert best == json.loads((folder.folder / "best.json").read_text())
    files = [Path(str(folder.trial(name).metrics_file)) for name in folder.trial_names()]
    before = [file.stat().st_mtime_ns for file in files]
    assert run_sweep(folder.read(), resume=True) == best
    assert [file.stat().st_mtime_ns for file in files] == before


def test_a_trial_that_fails_does_not_stop_the_others(tiny_config: RunConfig, tmp_path: Path) -> None:
    sweep = sweep_of(tiny_config, tmp_path, "nan", optim__learning_rate={"grid": [1e30, 1e-3]})
    best = run_sweep(sweep)
    assert best is not None
    assert best["settings"]["optim.learning_rate"] == 1e-3
    assert statuses_of(sweep) == ["failed", "finished"]
    error = (SweepFolder.of(sweep).trial("00000").folder / "error.txt").read_text()
    assert "the loss became nan at update" in error


def test_a_trial_that_crashes_is_named_with_its_reason(
    tiny_config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not a mistake of the user's: tried again, then reported, and the rest goes on."""
    monkeypatch.setattr(tuning, "MAX_FAILURES", 1)
    settings = ("algorithm=support.disturbed:CrashingLearner", "checkpoint.every=5", "evaluation.every=5")
    sweep = sweep_of(tiny_config, tmp_path, "crash", *settings, model__width={"grid": [8, 16]})
    best = run_sweep(sweep)
    assert best is not None
    assert best["settings"]["model.width"] == 16
    assert statuses_of(sweep) == ["failed", "finished"]
    assert "crashed at update 7" in (SweepFolder.of(sweep).trial("00000").folder / "error.txt").read_text()


def test_a_killed_trial_goes_on_from_its_checkpoint(tiny_config: RunConfig, tmp_path: Path) -> None:
    tiny = replace(tiny_config, total_timesteps=300, evaluation=replace(tiny_config.evaluation, every=0))
    settings = (f"algorithm={ALGORITHM}", "checkpoint.every=100", "scaling.cpus_per_worker=1")
    sweep = sweep_of(tiny, tmp_path, "killed", *settings, seed={"grid": [0, 1]})
    folder = SweepFolder.of(sweep)
    fault = plan_fault(tiny, at=250)
    run_sweep(sweep)
    assert not fault.exists()
    assert statuses_of(sweep) == ["finished"] * 2
    for name in folder.trial_names():
        config = folder.trial(name).read_config()
        scaling = replace(config.scaling, num_workers=0, cpus_per_worker=1)
        alone = replace(config, algorithm="decision_transformer", storage_path=str(tmp_path / "alone"), scaling=scaling)
        start_run(alone)
        assert losses_of(RunFolder.of(alone)) == losses_of(folder.trial(name))


def test_trials_that_asha_ends_keep_their_checkpoints(tiny_config: RunConfig, tmp_path: Path) -> None:
    sweep = sweep_of(
        tiny_config,
        tmp_path,
        "asha",
        "scheduler=asha",
        "num_samples=6",
        "max_concurrent=2",
        "total_timesteps=60",
        "metric=obedience_error",
        optim__learning_rate={"log_uniform": [1e-6, 1e-2]},
    )
    run_sweep(sweep)
    folder = SweepFolder.of(sweep)
    statuses = statuses_of(sweep)
    assert "stopped" in statuses
    assert "finished" in statuses
    for name in folder.trial_names():
        run = folder.trial(name)
        report = result_of(run)[1]
        assert report is not None
        assert checkpoint_fault(run.checkpoint(report.step)) is None
    assert len({row["updates"] for row in read_rows(sweep, folder)}) > 1


def test_a_population_changes_its_learning_rates(tiny_config: RunConfig, tmp_path: Path) -> None:
    sweep = sweep_of(
        tiny_config,
        tmp_path,
        "pbt",
        "scheduler=pbt",
        "num_samples=4",
        "max_concurrent=4",
        "total_timesteps=60",
        optim__learning_rate={"log_uniform": [1e-5, 1e-2]},
    )
    run_sweep(sweep)
    folder = SweepFolder.of(sweep)
    rates = []
    for name in folder.trial_names():
        lines = folder.trial(name).metrics_file.read_text().splitlines()
        config = folder.trial(name).read_config()
        assert checkpoint_fault(folder.trial(name).checkpoint(60)) is None
        first = json.loads(lines[0])["train/learning_rate"] / config.optim.learning_rate
        rates.append(first)
    assert len(rates) == 4
    assert max(rates) / min(rates) > 1.1  # some went on with another rate than they began with


def test_a_search_draws_for_all_seeds_at_once(tiny_config: RunConfig, tmp_path: Path) -> None:
    sweep = sweep_of(
        tiny_config,
        tmp_path,
        "optuna",
        "search=optuna",
        "num_samples=3",
        "num_seeds=2",
        optim__learning_rate={"log_uniform": [1e-5, 1e-2]},
        model__width={"choice": [8, 16]},
    )
    best = run_sweep(sweep)
    assert best is not None
    assert best["num_seeds"] == 2
    drawn: dict[float, set[int]] = {}
    for row in read_rows(sweep, SweepFolder.of(sweep)):
        drawn.setdefault(row["optim.learning_rate"], set()).add(row["seed"])
    assert list(drawn.values()) == [{0, 1}] * 3


def test_trials_with_several_workers_start_a_trainer_inside(tiny_config: RunConfig, tmp_path: Path) -> None:
    model = replace(tiny_config.model, dropout=0.0)
    sweep = sweep_of(
        replace(tiny_config, model=model),
        tmp_path,
        "workers",
        "scaling.num_workers=2",
        "scaling.cpus_per_worker=0.5",
        model__context_length={"grid": [4]},
    )
    run_sweep(sweep)
    assert statuses_of(sweep) == ["finished"]
    config = SweepFolder.of(sweep).trial("00000").read_config()
    alone = replace(config, storage_path=str(tmp_path / "alone"), scaling=replace(config.scaling, num_workers=0))
    start_run(alone)
    np.testing.assert_allclose(
        losses_of(SweepFolder.of(sweep).trial("00000")), losses_of(RunFolder.of(alone)), rtol=1e-4
    )


def test_what_can_not_be_run_is_refused_before_a_folder_is_made(tiny_config: RunConfig, tmp_path: Path) -> None:
    large = sweep_of(tiny_config, tmp_path, "large", "scaling.num_workers=3", "scaling.cpus_per_worker=2")
    with pytest.raises(ResourceError, match="and 0.01 of its own does not fit on nodes of 4 CPUs; lower"):
        run_sweep(large)
    searched = sweep_of(tiny_config, tmp_path, "x", "search=optuna", data__top_fraction={"uniform": [0.1, 1]})
    with pytest.raises(ConfigError, match="give them by choice"):
        run_sweep(searched)
    assert not (tmp_path / "sweeps").exists()


def test_trials_on_learned_values_take_them_from_a_run(tiny_config: RunConfig, tmp_path: Path) -> None:
    values = start_run(replace(tiny_config, name="values", algorithm="iql")).run
    overrides = ("data.return_source=value", "num_seeds=2")
    best = run_sweep(sweep_of(tiny_config, tmp_path, "stitching", *overrides, f"data.values={values}"))
    assert best is not None
    with pytest.raises(ConfigError, match="there is no run at iql/pendulum_values"):
        run_sweep(sweep_of(tiny_config, tmp_path, "unlearned", *overrides, "data.values=iql/pendulum_values"))


def test_no_process_or_group_is_left() -> None:
    wait_until(lambda: ray.available_resources().get("CPU", 0) == 4, what=str(ray.available_resources()))

"""Sweeps without Ray: what is trained, what is evaluated, and what is best."""

import csv
import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from support.sweeps import made_sweep

from dt_ray.config.loading import packaged_names, to_plain
from dt_ray.config.schema import RunConfig
from dt_ray.errors import ConfigError, RunError, UserError
from dt_ray.runs.storage import Folder
from dt_ray.runs.writing import to_json
from dt_ray.sweep import main
from dt_ray.sweeps.config import SweepConfig
from dt_ray.sweeps.folder import SweepFolder, evaluate_checkpoint, further_evaluations
from dt_ray.sweeps.loading import decode_sweep, load_sweep
from dt_ray.sweeps.tables import evaluate_best, find_best, read_rows, settings_of, write_table

CONFIG = {
    "env_id": "Pendulum-v1",
    "model": {"context_length": 5, "max_timesteps": 200},
    "evaluation": {"target_returns": [-130, -300], "num_episodes": 3, "every": 10, "max_timesteps": 200},
}


def sweep_of(tree: dict, *overrides: str) -> SweepConfig:
    return decode_sweep(tree, CONFIG, overrides, default_name="sweep")


@pytest.mark.parametrize("name", packaged_names("sweep"))
def test_every_packaged_sweep_can_be_run(name: str) -> None:
    assert load_sweep(name, "decision_transformer/pendulum", (), default_name=name).trials()


@settings(max_examples=25)
@given(
    contexts=st.lists(st.integers(1, 5), min_size=1, max_size=3, unique=True),
    targets=st.lists(st.integers(-2000, 0), min_size=1, max_size=5, unique=True),
    seeds=st.lists(st.integers(0, 50), min_size=1, max_size=3, unique=True),
    num_seeds=st.integers(1, 3),
    num_samples=st.integers(1, 3),
)
def test_what_only_evaluations_read_multiplies_evaluations_alone(
    contexts: list[int], targets: list[int], seeds: list[int], num_seeds: int, num_samples: int
) -> None:
    sweep = sweep_of(
        {
            "model.context_length": {"grid": contexts},
            "optim.learning_rate": {"log_uniform": [1e-5, "1e-2"]},
            "evaluation.target_returns": {"grid": targets},
            "evaluation.seed": {"grid": seeds},
            "num_seeds": num_seeds,
            "num_samples": num_samples,
        }
    )
    trials = sweep.trials()
    assert len(trials) == sweep.num_trials == len(contexts) * num_seeds * num_samples
    assert len({json.dumps(trial) for trial in trials.values()}) == len(trials)
    for name, chosen in trials.items():
        config = sweep.run_config(name, chosen, storage_path="somewhere")
        evaluations = sweep.evaluations(config)
        assert [evaluation.seed for evaluation in evaluations] == seeds
        assert all(evaluation.target_returns == tuple(map(float, targets)) for evaluation in evaluations)
        assert config.evaluation == evaluations[0]
        assert 1e-5 <= config.optim.learning_rate <= 1e-2


def test_draws_are_shared_by_seeds_and_drawn_anew_at_each_point() -> None:
    tree = {
        "optim.learning_rate": {"log_uniform": [1e-5, 1e-2]},
        "model.width": {"uniform": [16, 64]},
        "model.activation": {"choice": ["relu", "gelu"]},
        "model.context_length": {"grid": [1, 2]},
        "num_samples": 8,
        "num_seeds": 2,
    }
    trials = list(sweep_of(tree).trials().values())
    assert trials == list(sweep_of(tree).trials().values())
    for one, other in zip(trials[::2], trials[1::2], strict=True):
        assert {**one, "seed": 0} == {**other, "seed": 0}
        assert (one["seed"], other["seed"]) == (0, 1)
        assert isinstance(one["model.width"], int)
    assert len({trial["optim.learning_rate"] for trial in trials}) == 16
    assert {trial["model.activation"] for trial in trials} == {"relu", "gelu"}


def test_a_sweep_file_gives_its_sweep_again() -> None:
    tree = {"model.context_length": {"grid": [1, 3]}, "evaluation.target_returns": {"grid": [-100, [-200, -300]]}}
    sweep = sweep_of(tree, "num_seeds=2", "optim.batch_size=16", "metric=obedience_error")
    assert sweep.base.optim.batch_size == 16
    assert sweep.evaluations(sweep.base)[0].target_returns == (-100.0, -200.0, -300.0)
    again = yaml.safe_load(sweep.to_yaml())
    config = again.pop("config")
    assert decode_sweep(again, config, (), default_name="other") == sweep


def test_sections_may_be_written_out() -> None:
    """And leave the rest of their section as it is."""
    nested = {
        "model": {"context_length": {"grid": [1, 3]}, "width": 32},
        "evaluation": {"num_episodes": 7},
        "mode": "min",
    }
    dotted = {"model.context_length": {"grid": [1, 3]}, "model.width": 32, "evaluation.num_episodes": 7, "mode": "min"}
    assert sweep_of(nested) == sweep_of(dotted)
    assert sweep_of(nested).base.model.max_timesteps == 200
    assert sweep_of(nested).settings.direction == "min"
    assert sweep_of({"metric": "obedience_error"}).settings.direction == "min"


def test_an_override_fixes_or_sweeps_its_key() -> None:
    tree = {"model.context_length": {"grid": [1, 3]}}
    fixed = sweep_of(tree, "model.context_length=2", "optim.learning_rate={grid: [1e-3, 1e-2]}")
    assert [axis.key for axis in fixed.axes] == ["optim.learning_rate"]
    assert fixed.base.model.context_length == 2
    assert len(fixed.trials()) == 2


@pytest.mark.parametrize(
    ("tree", "says"),
    [
        ({"model.contextlength": {"grid": [1]}}, "no such key; did you mean model.context_length?"),
        ({"target_return": {"grid": [1]}}, "did you mean evaluation.target_returns?"),
        ({"model.width": {"grid": 3}}, "model.width: grid takes a list, got 3"),
        ({"model.width": {"grid": []}}, "takes a list"),
        ({"optim.learning_rate": {"uniform": [1, 1e-3]}}, "takes [low, high]"),
        ({"optim.learning_rate": {"log_uniform": [0, 1]}}, "above 0"),
        ({"optim.learning_rate": {"uniform": ["low", 1]}}, "takes [low, high]"),
        ({"evaluation.seed": {"uniform": [0, 5]}}, "give them by grid"),
        ({"model.width": {"grid": [16]}, "num_samples": 2}, "nothing to draw 2 of"),
        ({"seed": {"grid": [0, 1]}, "num_seeds": 2}, "seed is swept already"),
        ({"name": {"grid": ["a"]}}, "can't be swept"),
        ({"scheduler": "hyperband"}, "scheduler: Input should be 'none', 'asha'"),
        ({"num_seeds": 0}, "num_seeds: Input should be greater than or equal to 1"),
        ({"scheduler": "asha", "evaluation.every": 0}, "set evaluation.every"),
        ({"metric": "normalized_score"}, "needs evaluation.random_return"),
        ({"scaling.num_workers": [1, 2]}, "fixed number of workers"),
        ({"scheduler": "pbt", "model.width": {"choice": [8, 16]}, "num_samples": 2}, "pbt changes optim.learning_rate"),
        ({"scheduler": "pbt", "optim.learning_rate": {"uniform": [0.1, 1]}}, "num_samples of 2 or more"),
        ({"search": "optuna"}, "nothing to search"),
        ({"evaluation.context_length": {"grid": [3, 9]}}, "can't see more, got 9"),
        ({"model.width": {"grid": [10]}, "model.num_heads": {"grid": [1, 3]}}, "must divide model.width=10, got 3"),
    ],
)
def test_a_faulty_sweep_is_refused_before_anything_is_trained(tree: dict, says: str) -> None:
    with pytest.raises(ConfigError) as error:
        sweep_of(tree)
    assert says in str(error.value)


def test_all_problems_of_a_sweep_are_said_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        sweep_of({"model.widht": {"grid": [1]}, "model.width": {"grid": 1}, "metric": "loss"})
    assert str(error.value).startswith("3 problem(s)")


def test_the_table_and_the_best_are_what_the_runs_say(tiny_config: RunConfig, tmp_path: Path) -> None:
    sweep, folder = made_sweep(
        tiny_config,
        tmp_path,
        optim__learning_rate={"grid": [1e-4, 1e-2]},
        evaluation__target_returns={"grid": [-100, -300, -500]},
        evaluation__context_length={"grid": [4, 2]},
    )
    missing = further_evaluations(sweep, folder)
    assert len(missing) == 4  # a trial each, under the second context length
    for checkpoint, evaluation, file in missing:
        file.write_text(evaluate_checkpoint(checkpoint, evaluation).to_json())
    assert further_evaluations(sweep, folder) == []

    rows = read_rows(sweep, folder)
    assert len(rows) == 2 * 2 * 2 * 3  # rates, seeds, contexts, targets
    write_table(rows, folder.folder / "trials.csv")
    table = list(csv.DictReader(io.StringIO((folder.folder / "trials.csv").read_text())))
    assert len(table) == len(rows)
    run = folder.trial(table[0]["trial"])
    target = run.read_evaluation(10).targets[0]
    assert float(table[0]["return_mean"]) == target.return_mean
    assert table[0]["checkpoint"] == str(run.checkpoint(10))
    assert {"optim.learning_rate", "evaluation.context_length", "seed", "updates", "train_wall_s"} <= set(table[0])

    best = find_best(rows, sweep)
    assert best is not None
    means: dict[str, list[float]] = {}
    for row in rows:
        means.setdefault(json.dumps(settings_of(row, sweep)), []).append(row["return_mean"])
    assert best["metric_mean"] == pytest.approx(max(np.mean(values) for values in means.values()))
    (evaluation,) = (
        each for each in sweep.evaluations(run.read_config())
        if each.context_length == best["settings"]["evaluation.context_length"]
    )  # fmt: skip
    evaluation = replace(evaluation, target_returns=(best["settings"]["target_return"],))
    full = evaluate_best(best, evaluation)
    assert full == json.loads(json.dumps(full))  # as best.json holds it
    assert full["return_mean"] == pytest.approx(best["metric_by_seed"][str(best["seed"])], rel=1e-4)
    again = subprocess.run(
        [sys.executable, *full["command"].split()[1:], "--json", tmp_path / "again.json"],
        check=True,
        capture_output=True,
    )
    assert b"Traceback" not in again.stderr
    report = json.loads((tmp_path / "again.json").read_text())
    assert report["targets"][0]["return_mean"] == full["return_mean"]


def test_the_best_setting_may_be_as_much_as_can_be_had(tiny_config: RunConfig, tmp_path: Path) -> None:
    config = replace(tiny_config, model=replace(tiny_config.model, conditioning="head"))
    sweep, folder = made_sweep(config, tmp_path, evaluation__target_returns={"grid": ["max"]})
    best = find_best(read_rows(sweep, folder), sweep)
    assert best is not None
    (evaluation,) = sweep.evaluations(folder.trial(best["trial"]).read_config())
    written = json.loads(to_json(evaluate_best(best, evaluation)))
    assert written["settings"]["target_return"] == "max"
    assert "--target-return=max" in written["command"]


def test_a_setting_whose_other_seed_failed_is_not_the_best(tiny_config: RunConfig, tmp_path: Path) -> None:
    sweep, folder = made_sweep(tiny_config, tmp_path, optim__learning_rate={"grid": [1e-4, 1e-2]})
    best = find_best(read_rows(sweep, folder), sweep)
    assert best is not None
    lost = folder.trial(best["trial"])
    (lost.folder / "error.txt").write_text("the loss became nan\n")
    rows = read_rows(sweep, folder)
    assert [row["status"] for row in rows if row["trial"] == best["trial"]] == ["failed"]
    other = find_best(rows, sweep)
    assert other is not None
    assert other["settings"]["optim.learning_rate"] != best["settings"]["optim.learning_rate"]


def test_a_sweep_is_not_replaced_unasked(tiny_config: RunConfig, tmp_path: Path) -> None:
    sweep = decode_sweep({}, to_plain(tiny_config) | {"storage_path": str(tmp_path)}, (), default_name="x")
    folder = SweepFolder.of(sweep)
    folder.create(sweep)
    assert folder.read() == sweep
    with pytest.raises(RunError, match="exists already"):
        folder.create(sweep)
    folder.create(sweep, overwrite=True)
    (tmp_path / "mine").mkdir()
    with pytest.raises(RunError, match="is no sweep"):
        SweepFolder(Folder.at(tmp_path / "mine")).create(sweep, overwrite=True)
    with pytest.raises(RunError, match="no sweep.yaml"):
        SweepFolder(Folder.at(tmp_path / "mine")).read()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--sweep", "target_return_contextlength"], "did you mean target_return_context_length?"),
        (
            ["model.context_length={grid: [1, 30]}", "data.window_length=3"],
            "under model.attention=window a training window is",
        ),
        (["--resume", "nothing"], "is no sweep"),
    ],
)
def test_the_command_refuses_with_one_message(
    arguments: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        main(arguments)
    assert says in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_table_keeps_whole_numbers_and_leaves_missing_values_empty(tmp_path: Path) -> None:
    file = Folder.at(tmp_path / "table.csv")
    rows = [{"trial": "00001", "updates": 10, "score": None}, {"trial": "a,b", "return_mean": -0.1 - 0.2, "kept": True}]
    write_table(rows, file)
    assert file.read_text() == (
        'trial,updates,score,return_mean,kept\n00001,10,,,\n"a,b",,,-0.30000000000000004,True\n'
    )

"""Packaged experiments: found by their settings, judged by their evaluations."""

from dataclasses import replace

import pytest

from dt_ray.config.experiments import EXPERIMENTS, Experiment, find_experiment
from dt_ray.config.loading import load_config, packaged_names
from dt_ray.train import main


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda each: each.config)
def test_an_experiment_is_a_packaged_configuration_that_is_evaluated_where_it_is_judged(experiment: Experiment) -> None:
    config = load_config(experiment.config)
    assert experiment.target_return in config.evaluation.target_returns
    assert set(experiment.baselines) <= set(packaged_names())
    assert find_experiment(config) == experiment
    elsewhere = replace(config, name="mine", seed=3, scaling=replace(config.scaling, num_workers=2))
    assert find_experiment(elsewhere) == experiment
    assert find_experiment(replace(config, total_timesteps=10)) is None


def test_an_experiment_says_whether_its_returns_are_as_expected() -> None:
    experiment = EXPERIMENTS[0]
    low, high = experiment.expected
    for value, says in ((low - 1, "is below"), ((low + high) / 2, "is within"), (high + 1, "is above")):
        assert says in experiment.judge({experiment.target_return: value})
    assert "not evaluated at -130" in experiment.judge({})


def test_the_command_lists_them(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--list"])
    printed = capsys.readouterr().out
    assert all(experiment.config in printed for experiment in EXPERIMENTS)
    assert all(name in printed for name in packaged_names() if not name.startswith("sweep/"))

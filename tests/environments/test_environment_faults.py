"""What an environment answers is taken as it stands or refused in one sentence that names it, before the training where
it can be known; what is learned is not lost to a fault that shows later."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.environments import Constant, collect, config_of, env_id, settings_of
from support.quirky_environments import FAULTY_STEP, LostSimulator, Tank

from dt_ray.api import DecisionTransformer
from dt_ray.cli.data import main as data_main
from dt_ray.config.schema import DataConfig, EvaluationConfig, RunConfig
from dt_ray.data import read_dataset
from dt_ray.data.spaces import read_spaces
from dt_ray.distributed.resources import Node, plan_resources
from dt_ray.environments.batched import make_environments
from dt_ray.environments.behaviors import make_behavior
from dt_ray.environments.checked import GymnasiumEnvironments
from dt_ray.errors import BrokenEnvironmentError, UnsupportedSpaceError, UserError
from dt_ray.evaluate import main as evaluate_main
from dt_ray.export import main as export_main
from dt_ray.jobs.training import name_run, start_run
from dt_ray.play.evaluation import evaluate
from dt_ray.play.rollout import rollout
from dt_ray.train import main as train_main

EARLY = {
    "NoReward": "a reward of None",
    "TwoRewards": r"a reward of an array of shape \(2,\)",
    "TextReward": "a reward of '-1'",
    "OldReset": r"reset\(\) returned an array of shape \(2,\)",
    "ResetWithoutSeed": r"reset\(\) raised TypeError.*'seed'.*reset\(\*, seed=None",
    "OldStep": r"step\(\) returned 4 values, as in gym before 0.26",
    "OldStepLimited": "it has the API of gym before 0.26",
    "NothingFromStep": r"step\(\) returned None",
    "InfoAsFlag": "truncated is a dict",
    "FlatShape": r"an observation of shape \(1, 2\); its observation_space has \(2,\)",
    "ThreeNumbers": r"an observation of shape \(3,\)",
    "NamedNumbers": "an observation of a dict",
}
LATE = {
    "LostSimulator": r"step\(\) raised RuntimeError: lost the simulator \(quirky_environments.py, line \d+\)",
    "LateNan": "a reward of nan",
    "LateNanObservation": "an observation that is not finite",
}
ALIKE = ("ArrayReward", "Flags", "ListObservation", "ReusedArray", "ScalesActionInPlace")


@pytest.fixture(scope="module")
def tank_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "tank"
    collect("Plain", folder)
    return folder


@pytest.mark.parametrize("name", EARLY)
def test_a_fault_that_two_steps_show_is_told_before_anything_is_written(
    name: str, tank_data: Path, tmp_path: Path
) -> None:
    message = f"{env_id(name)} can't be played .*{EARLY[name]}"
    with pytest.raises(BrokenEnvironmentError, match=message):
        train_main(settings_of(tank_data, tmp_path, name))
    with pytest.raises(BrokenEnvironmentError, match=message):
        collect(name, tmp_path / "data")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", LATE)
def test_a_fault_that_shows_later_costs_no_training(name: str, tank_data: Path, tmp_path: Path) -> None:
    place = rf"seed 0, step {FAULTY_STEP}\): {LATE[name]}"
    with pytest.raises(BrokenEnvironmentError, match=f"its checkpoint is .*step-00000004.*{place}.*--resume"):
        train_main(settings_of(tank_data, tmp_path, name))
    summary = json.loads((tmp_path / "runs" / name / "summary.json").read_text())
    assert (summary["status"], summary["step"], summary["last"], summary["best"]) == ("finished", 4, None, None)
    with pytest.raises(BrokenEnvironmentError, match=place):
        evaluate_main([str(tmp_path / "runs" / name)])
    with pytest.raises(BrokenEnvironmentError, match=rf"seed 1000\d\d, step {FAULTY_STEP}\): {LATE[name]}"):
        collect(name, tmp_path / "data")


def test_a_mended_environment_is_evaluated_by_resuming(
    tank_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(BrokenEnvironmentError):
        train_main(settings_of(tank_data, tmp_path, "LostSimulator"))
    monkeypatch.setattr(LostSimulator, "step", Tank.step)
    train_main(["--resume", str(tmp_path / "runs/LostSimulator")])
    summary = json.loads((tmp_path / "runs/LostSimulator/summary.json").read_text())
    assert summary["last"]["step"] == 4


@pytest.mark.parametrize("name", ALIKE)
def test_habits_that_mean_the_same_give_the_same_episodes(name: str) -> None:
    def play(name: str) -> Any:
        seeds = [10_000, 10_001, 10_002]
        policy = make_behavior("random", env_id(name), read_spaces(env_id(name)), seeds=seeds)
        return rollout(policy, env_id(name), seeds=seeds, target_returns=[0.0] * 3, max_timesteps=20)

    for column, values in vars(play("Plain")).items():
        np.testing.assert_array_equal(getattr(play(name), column), values, err_msg=column)


def test_all_environments_are_closed_whatever_happens() -> None:
    before = Tank.num_open
    policy = make_behavior("random", env_id("LateNan"), read_spaces(env_id("LateNan")), seeds=[0, 1])
    with pytest.raises(BrokenEnvironmentError):
        rollout(policy, env_id("LateNan"), seeds=[0, 1], target_returns=[0.0, 0.0], max_timesteps=20)
    assert Tank.num_open == before


def test_the_last_observation_of_an_ended_episode_may_be_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a simulation that exploded, for which its environment ends the episode."""

    def explode(self: Tank, action: Any) -> Any:
        return np.array([np.inf, 0.0]), -1.0, True, False, {}

    monkeypatch.setattr(Tank, "step", explode)
    envs = make_environments(env_id("Plain"), 1)
    envs.reset([0])
    steps = envs.step(np.zeros(1, int), np.zeros((1, 1), np.float32))
    assert np.isnan(steps.observations).all()
    assert steps.terminated.all()


@given(max_envs=st.integers(1, 12), num_episodes=st.integers(1, 5), num_targets=st.integers(1, 2))
@settings(max_examples=25)
def test_no_more_environments_are_open_than_asked_for_and_results_do_not_change(
    max_envs: int, num_episodes: int, num_targets: int
) -> None:
    def play(max_envs: int) -> Any:
        config = EvaluationConfig(
            target_returns=(-1.0, -2.0)[:num_targets], num_episodes=num_episodes, max_timesteps=20, max_envs=max_envs
        )
        return evaluate(Constant(), env_id("Plain"), config, step=0).targets

    Tank.most_open = Tank.num_open = 0
    assert play(max_envs) == play(1000)
    Tank.most_open = 0
    play(max_envs)
    assert Tank.most_open == min(max_envs, num_episodes * num_targets)


def test_a_simulator_that_can_be_opened_once_is_collected_trained_and_evaluated(tmp_path: Path) -> None:
    for name, max_envs in (("many", "100"), ("one", "1")):
        Tank.most_open = Tank.num_open = 0
        collect("Plain", tmp_path / name, "--max-envs", max_envs)
        assert Tank.most_open == min(int(max_envs), 8)
    many, one = (read_dataset(DataConfig(path=str(tmp_path / name))) for name in ("many", "one"))
    for column in ("observations", "actions", "rewards", "starts", "final_observations"):
        np.testing.assert_array_equal(getattr(many, column), getattr(one, column))
    Tank.most_open = 0
    train_main(settings_of(tmp_path / "one", tmp_path, "Plain", "evaluation.max_envs=1"))
    evaluate_main([str(tmp_path / "runs/Plain"), "--max-envs", "1"])
    export_main([str(tmp_path / "runs/Plain"), "--format", "torch", "--out", str(tmp_path / "policy.pt2")])
    assert Tank.most_open == 1


@given(max_envs=st.integers(1, 6), wanted=st.one_of(st.none(), st.integers(0, 6)), cpus=st.integers(1, 32))
def test_there_are_no_more_actors_than_environments_may_be_open(max_envs: int, wanted: int | None, cpus: int) -> None:
    config = RunConfig(evaluation=EvaluationConfig(max_envs=max_envs, num_actors=wanted))
    assert plan_resources(config, [Node(cpus=cpus)]).num_actors <= max_envs


def test_arguments_of_an_environment_reach_every_place_that_makes_one(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedSpaceError, match="NeedsFile.*missing 1 required.*'file'.*env_kwargs.NAME=VALUE"):
        collect("NeedsFile", tmp_path / "data")
    given_file = ["--env-kwargs", "{file: '0.3'}"]
    collect("NeedsFile", tmp_path / "data", *given_file)
    data_main(["validate", str(tmp_path / "data"), "--env", env_id("NeedsFile"), *given_file])
    given_file = ["env_kwargs.file='0.3'"]
    train_main(settings_of(tmp_path / "data", tmp_path, "NeedsFile", *given_file))
    run = tmp_path / "runs/NeedsFile"
    evaluate_main([str(run)])
    export_main([str(run), "--format", "torch", "--out", str(tmp_path / "policy.pt2")])
    loaded = DecisionTransformer.load(run)
    assert loaded.config.env_kwargs == {"file": "0.3"}
    report = loaded.evaluate(target_returns=[-1.0])
    config = EvaluationConfig(target_returns=(-1.0,), num_episodes=3, max_timesteps=20)
    there = evaluate(loaded.policy(), env_id("NeedsFile"), config, step=4, env_kwargs={"file": "0.3"}).to_dict()
    assert report["targets"][0]["episode_returns"] == there["targets"][0]["episode_returns"]
    elsewhere = evaluate(loaded.policy(), env_id("NeedsFile"), config, step=4, env_kwargs={"file": "0.0"}).to_dict()
    assert report["targets"][0]["episode_returns"] != elsewhere["targets"][0]["episode_returns"]


@pytest.mark.parametrize("name", ["Unlimited", "HalfLimited", "LargestFloats"])
def test_an_environment_without_action_bounds_gets_them_by_a_setting(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="random actions are drawn within bounds"):
        collect(name, tmp_path / "data")
    bounds = "[[0.0],[0.5]]"
    collect(name, tmp_path / "data", "--action-bounds", bounds)
    data_main(["validate", str(tmp_path / "data"), "--env", env_id(name)])
    with pytest.raises(UnsupportedSpaceError, match=f"{name}-v0 have no usable bounds .*data.action_bounds=data"):
        train_main(settings_of(tmp_path / "data", tmp_path, name, "data.action_bounds=environment"))
    logged = read_dataset(DataConfig(path=str(tmp_path / "data"))).actions
    for number, (given_bounds, low, high) in enumerate(
        [("data", float(logged.min()), float(logged.max())), (bounds, 0.0, 0.5)]
    ):
        overrides = [f"data.action_bounds={given_bounds}", f"name=run{number}"]
        config = config_of(settings_of(tmp_path / "data", tmp_path, name, *overrides))
        result = start_run(name_run(config, "run"))
        facts = json.loads((Path(result.run) / "checkpoints/step-00000004/policy/policy.json").read_text())
        assert facts["spec"]["action_low"] == [pytest.approx(low)]
        assert facts["spec"]["action_high"] == [pytest.approx(high)]
        evaluate_main([result.run])
        collected = tmp_path / f"again{number}"
        collect(name, collected, "--behavior", result.run)
        actions = read_dataset(DataConfig(path=str(collected))).actions
        assert low - 1e-6 <= actions.min() <= actions.max() <= high + 1e-6


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ("[[-1],[1, 2]]", r"with 1 number\(s\) each"),
        ("[[1],[-1]]", "lowest must not be above the highest"),
        ("[[-3],[1]]", "within the bounds of"),
        ("[[-1],[.inf]]", "within the bounds of"),
    ],
)
def test_bounds_that_do_not_fit_are_refused(bounds: str, message: str, tank_data: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedSpaceError, match=message):
        train_main(settings_of(tank_data, tmp_path, "Plain", f"data.action_bounds={bounds}"))


def test_a_dimension_with_one_value_is_acted_with_that_value(tmp_path: Path) -> None:
    collect("FixedSecond", tmp_path / "data")
    train_main(settings_of(tmp_path / "data", tmp_path, "FixedSecond"))
    model = DecisionTransformer.load(tmp_path / "runs/FixedSecond")
    assert model.predict(np.zeros((5, 2), np.float32))[:, 1].tolist() == [0.25] * 5
    lines = (tmp_path / "runs/FixedSecond/metrics.jsonl").read_text().splitlines()
    assert all(np.isfinite(json.loads(line)["train/loss"]) for line in lines)
    export_main([str(tmp_path / "runs/FixedSecond"), "--format", "torch", "--out", str(tmp_path / "policy.pt2")])


def test_an_environment_that_is_half_made_is_closed() -> None:
    before = Tank.num_open
    with pytest.raises(UnsupportedSpaceError):
        GymnasiumEnvironments(env_id("NeedsFile"), 2, {"file": "no number"})
    assert Tank.num_open == before


def crash(observation: Any, generator: Any) -> Any:
    raise ZeroDivisionError("no pump")


def forget(observation: Any, generator: Any) -> Any:
    return None


@pytest.mark.parametrize("name", ["crash", "forget"])
def test_a_behaviour_that_gives_no_action_is_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"the (behaviour {__name__}:{name} gives no action|policy gave the action)"):
        collect("Plain", tmp_path / "data", "--behavior", f"{__name__}:{name}")

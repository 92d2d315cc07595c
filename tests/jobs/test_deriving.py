"""From a log on disk to a configuration without `auto`."""

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from support.examples import make_episodes, write_episodes

from dt_ray.api import BehaviorCloning, DecisionTransformer
from dt_ray.cli.data import main as data_main
from dt_ray.config.loading import decode_config, read_settings, to_yaml
from dt_ray.data.description.traps import all_traps
from dt_ray.data.logs.datasets import read_parts
from dt_ray.data.logs.episodes import to_table
from dt_ray.data.logs.outline import make_outline, outline_rows
from dt_ray.errors import ConfigError, DataError, RunError, UnsupportedSpaceError
from dt_ray.jobs.deriving import name_of_log, resolve_settings
from dt_ray.sweeps.loading import load_sweep


def resolve(*overrides: str) -> dict:
    settings = resolve_settings(read_settings(None, overrides))
    return {each.key: each.value for each in settings.derived} | {"config": settings.config}


def test_our_logs_name_their_environment(pendulum_data: Path) -> None:
    found = resolve(f"data.path={pendulum_data}")
    assert (found["env_id"], found["data.action_bounds"]) == ("Pendulum-v1", "environment")
    assert (found["evaluation.max_timesteps"], found["evaluation.reference_return"]) == (200, -132.4)
    assert found["config"].env_id == "Pendulum-v1"


def test_the_resolved_configuration_reproduces_itself_and_is_called_after_its_log(pendulum_data: Path) -> None:
    config = resolve(f"data.path={pendulum_data}")["config"]
    assert decode_config(yaml.safe_load(to_yaml(config))) == config
    assert resolve_settings(yaml.safe_load(to_yaml(config))).derived == ()
    assert name_of_log(config) == pendulum_data.name


def test_a_log_that_names_no_environment_has_none(tmp_path: Path) -> None:
    file = write_episodes(make_episodes([5, 9, 7]), tmp_path / "log.parquet")
    found = resolve(f"data.path={file}")
    assert found["config"].env_id is None
    (low,), (high,) = found["config"].data.action_bounds
    assert -2.3 < low < -1 < 1 < high < 2.3
    assert (found["model.max_timesteps"], found["model.context_length"]) == (9, 9)
    assert found["data.validation_fraction"] == pytest.approx(1 / 3, abs=0.01)


def test_an_outline_is_the_same_however_the_log_lies_in_files(tmp_path: Path) -> None:
    data = make_episodes([5, 9, 7, 2], action_dim=2)
    write_episodes(data, tmp_path / "one" / "all.parquet")
    for number in range(4):
        pq.write_table(to_table(data.select([number])), _made(tmp_path / "four") / f"{number}.parquet")
    one, four = (_outline(decode_config({"data": {"path": str(tmp_path / name)}})) for name in ("one", "four"))
    for name, value in vars(one).items():
        np.testing.assert_equal(getattr(four, name), value)
    assert one.num_steps == 23
    np.testing.assert_allclose(one.returns, data.episode_returns, rtol=1e-5)


def test_actions_that_are_often_the_largest_have_their_bound_there(tmp_path: Path) -> None:
    data = make_episodes([50, 50], action_dim=2)
    data.actions[:, 1] = np.clip(data.actions[:, 1], -1, 1)
    outline = _outline(decode_config({"data": {"path": str(write_episodes(data, tmp_path / "log.parquet"))}}))
    assert outline.is_low_a_limit.tolist() == outline.is_high_a_limit.tolist() == [False, True]


@pytest.mark.parametrize("kind", ["numbers", "two buttons", "one-hot"])
def test_a_log_of_discrete_actions_is_not_taken_for_continuous_without_a_word(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = np.random.default_rng(0).integers(0, 4, size=50)
    actions = {"numbers": chosen[:, None], "one-hot": np.eye(4)[chosen], "two buttons": np.eye(4)[chosen][:, :2]}[kind]
    log = replace(make_episodes([20, 30], action_dim=actions.shape[1]), actions=actions.astype(np.float32))
    file = write_episodes(log, tmp_path / "log.parquet")
    if kind == "one-hot":
        with pytest.raises(ConfigError, match=r"a choice among 4; dt_ray trains on continuous actions only"):
            resolve(f"data.path={file}")
    else:
        derived = resolve_settings(read_settings(None, [f"data.path={file}"])).derived
        assert "if they are choices" in next(each.why for each in derived if each.key == "data.action_bounds")
    assert any("as a discrete action is" in trap for trap in all_traps(log)) == (kind == "one-hot")
    if kind != "one-hot":
        data_main(["validate", str(file)])
        assert "if they are choices" in capsys.readouterr().out
    bounds = [[0.0] * actions.shape[1], [3.0] * actions.shape[1]]
    named = resolve(f"data.path={file}", f"data.action_bounds={bounds}")["config"]
    assert named.data.action_bounds == tuple(map(tuple, bounds))
    log.actions[7, 0] = 0.5
    assert not any("discrete" in trap for trap in all_traps(log))


def test_a_module_that_a_log_names_is_not_run(tmp_path: Path) -> None:
    table = to_table(make_episodes([3, 3]), {"env_id": "payload:Mine-v0"})
    pq.write_table(table, tmp_path / "log.parquet")
    with pytest.raises(RunError, match="would run the module payload"):
        resolve(f"data.path={tmp_path}/log.parquet")
    assert resolve(f"data.path={tmp_path}/log.parquet", "env_id=null")["config"].env_id is None


def test_an_environment_of_the_log_that_is_not_here_can_be_left_out(tmp_path: Path) -> None:
    pq.write_table(to_table(make_episodes([3, 3]), {"env_id": "Nowhere-v3"}), tmp_path / "log.parquet")
    with pytest.raises(UnsupportedSpaceError, match=r"The log names it; to train without it, env_id=null"):
        resolve(f"data.path={tmp_path}/log.parquet")


def test_what_is_missing_or_in_doubt_is_said_with_what_to_type(tmp_path: Path, pendulum_data: Path) -> None:
    for overrides, says in (
        (["env_id=Pendulum-v1"], r"data.path: there is no log .* collect --env Pendulum-v1 --out DIR"),
        (
            ["env_id=Pendulum-v1", "data.path=new", "data.collect={behavior: expert, num_episodes: 9}"],
            "again: python -m dt_ray.data collect --env Pendulum-v1 --behavior expert --episodes 9 --seed 100000 --out",
        ),
        ([f"data.path={pendulum_data}", "model.widht=3", "total_timesteps=0"], r"2 problem\(s\)"),
    ):
        with pytest.raises(ConfigError, match=says):
            resolve(*overrides)
    for name in ("a", "b"):
        table = to_table(make_episodes([3, 3]), {"env_id": f"{name}-v0"})
        pq.write_table(table, tmp_path / f"{name}.parquet")
    with pytest.raises(DataError, match=r"names the environment a-v0 and .*b-v0; say which one"):
        resolve(f"data.mix={{{tmp_path}/a.parquet: 1, {tmp_path}/b.parquet: 1}}")


def test_what_the_user_sets_stays(pendulum_data: Path) -> None:
    found = resolve(f"data.path={pendulum_data}", "evaluation.target_returns=[9]", "data.action_bounds=[[-1],[1]]")
    assert found["config"].data.action_bounds == ((-1.0,), (1.0,))
    assert found["config"].evaluation.target_returns == (9.0,)
    assert found["evaluation.target_returns"] == [9.0], "marked, as it is beyond the data"


def test_a_csv_of_a_machine_is_one_override_away(tmp_path: Path) -> None:
    with (tmp_path / "log.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["", "time [s]", "episode", "level", "valve", "reward"])
        for row in range(40):
            rows.writerow([row, 0.5 * (row % 10), row // 10, np.sin(row), row % 3, 1.5])
    columns = "data.columns={episode_id: episode, timestep: null, observation: level, action: valve}"
    config = resolve(f"data.path={tmp_path}/log.csv", columns)["config"]
    assert (config.env_id, config.evaluation.target_returns) == (None, (15.0,))


def test_python_and_sweeps_derive_alike(pendulum_data: Path) -> None:
    ours = resolve(f"data.path={pendulum_data}")["config"]
    assert DecisionTransformer(data={"path": str(pendulum_data)}).config == ours
    assert BehaviorCloning(data={"path": str(pendulum_data)}).config.algorithm == "behavior_cloning"
    sweep = load_sweep(
        None, None, [f"data.path={pendulum_data}"], default_name="x", resolve=lambda tree: resolve_settings(tree).config
    )
    assert sweep.base.evaluation.target_returns == ours.evaluation.target_returns
    assert [axis.key for axis in sweep.axes] == ["model.context_length"]
    with pytest.raises(ConfigError, match="target_return_context_length is for Pendulum-v1"):
        load_sweep("target_return_context_length", None, ["env_id=Hopper-v5"])


def _outline(config):
    return make_outline([outline_rows(part, config) for part in read_parts(config.data)], config)


def _made(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    return folder

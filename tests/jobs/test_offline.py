"""From a log to estimates of returns: at the end of a training, by the command, and where a target return is chosen."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.examples import make_episodes, write_episodes
from support.reports import make_offline_report

from dt_ray import evaluate, export, report, serve, train
from dt_ray.api import DecisionTransformer
from dt_ray.config.loading import load_config
from dt_ray.config.schema import RunConfig
from dt_ray.errors import ConfigError, RunError, UserError
from dt_ray.jobs.offline import is_estimated, train_and_estimate, world_data
from dt_ray.runs.evaluation_report import EvaluationReport
from dt_ray.runs.folder import RunFolder
from dt_ray.runs.offline_report import OfflineReport
from dt_ray.runs.recommendations import recommended_target
from dt_ray.runs.storage import Folder
from dt_ray.sweeps.loading import load_sweep

SMALL = [
    *("model.width=16", "model.num_layers=1", "model.context_length=4", "optim.batch_size=8", "total_timesteps=20"),
    "scaling.num_workers=0",
]


@pytest.fixture(scope="module")
def log_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_episodes(
        make_episodes(list(range(5, 45)), action_dim=2), tmp_path_factory.mktemp("log") / "hall.parquet"
    )


@pytest.fixture(scope="module")
def run(log_file: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run without an environment, trained by the command."""
    storage = tmp_path_factory.mktemp("runs")
    train.main([f"data.path={log_file}", f"storage_path={storage}", "name=hall", *SMALL])
    return RunFolder(Folder.at(storage / "hall"))


def test_a_training_without_an_environment_ends_with_estimates(run: RunFolder) -> None:
    written = json.loads((run.folder / "evaluations/offline-step-00000020.json").read_text())
    assert set(written) == {
        *("step", "log", "world_model", "num_starts", "logged_returns", "supported", "best_target", "targets", "wall_s")
    }
    found = run.read_offline(20)
    assert found is not None
    asked = [target.target_return for target in found.targets]
    assert asked[: len(run.read_config().evaluation.target_returns)] == list(
        run.read_config().evaluation.target_returns
    )
    assert all((target.estimated_return is None) == bool(target.doubts) for target in found.targets)
    assert all(each["verdict"] for each in written["targets"])
    world = RunFolder(run.folder.parent / "hall-world").read_config()
    assert world.algorithm == "world_model"
    assert world.total_timesteps == 48  # in proportion to the policy's 20


def test_every_kept_checkpoint_is_estimated_where_there_is_no_environment(run: RunFolder) -> None:
    last = run.read_offline(20)
    assert last is not None
    asked = [last.best_target] if last.best_target is not None else list(run.read_config().evaluation.target_returns)
    assert len(run.checkpoint_steps()) >= 3
    for step in run.checkpoint_steps()[:-1]:
        found = run.read_offline(step)
        assert found is not None
        assert [target.target_return for target in found.targets] == asked
        assert found.world_model == last.world_model


def test_the_recommended_checkpoint_is_the_one_with_the_highest_estimate_wherever_a_checkpoint_is_taken(
    log_file: Path, tmp_path: Path
) -> None:
    settings = [f"data.path={log_file}", f"storage_path={tmp_path}", "name=hall", *SMALL]
    train.main([*settings, "evaluation.offline=false", "checkpoint.keep=2", "checkpoint.every=5"])
    run = RunFolder(Folder.at(tmp_path / "hall"))
    place = f"{run}/checkpoints/recommended"
    with pytest.raises(RunError, match=r"no checkpoint of .*hall is recommended.* --offline"):
        evaluate.main([place])
    assert "recommended" not in (run.read_summary() or {})
    kept = run.checkpoint_steps()
    assert len(kept) > 1
    assert 5 not in kept
    for step, estimate in {5: 9.0, kept[0]: 4.0, 20: 3.0}.items():
        run.write_offline(make_offline_report(step=step, best_target=1.5, supported=(1.0, 2.0), estimate=estimate))
    train.main(["--resume", str(run), "total_timesteps=35"])
    assert kept[0] in run.checkpoint_steps()
    assert (run.read_summary() or {})["recommended"] == {
        "step": kept[0], "target_return": 1.5, "estimated_return": 4.0, "interval90": [3.0, 5.0]
    }  # fmt: skip
    model, first = DecisionTransformer.load(place), np.zeros(3)
    same = DecisionTransformer.load(run.checkpoint(kept[0]).uri)
    np.testing.assert_array_equal(model.predict(first, target_return="auto"), same.predict(first, target_return=1.5))
    export.main([place, "--format", "torch", "--out", str(tmp_path / "policy.pt2")])


def test_the_command_uses_the_world_model_that_is_there_and_asks_for_what_it_is_told(
    run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (run.folder.parent / "hall-world/config.yaml").read_text()
    stamp = (run.folder.parent / "hall-world").stamps(recursive=True)
    file, picture = tmp_path / "offline.json", tmp_path / "offline.png"
    evaluate.main([str(run), "--offline", "--target-return", "3", "--json", str(file), "--plot", str(picture)])
    found = OfflineReport.from_json(file.read_text())
    assert found.targets[0].target_return == 3.0
    assert len(found.targets[0].nearest_episodes) == 3
    assert picture.stat().st_size > 10_000
    assert (run.folder.parent / "hall-world/config.yaml").read_text() == before
    assert (run.folder.parent / "hall-world").stamps(recursive=True) == stamp
    shown = capsys.readouterr().out
    assert "estimated return" in shown
    assert "the log supports target returns of" in shown
    report.main([str(run), "--out", str(tmp_path / "report")])
    assert "Estimated from the log alone" in (tmp_path / "report/report.html").read_text()
    assert (tmp_path / "report/offline_estimates.csv").exists()


def test_another_log_has_a_world_model_of_its_own_and_must_fit_the_policy(run: RunFolder, tmp_path: Path) -> None:
    other = write_episodes(make_episodes(list(range(5, 30)), action_dim=2, seed=5), tmp_path / "other.parquet")
    evaluate.main([str(run), "--offline", str(other)])
    found = run.read_offline(20)
    assert found is not None
    assert found.log == (str(other),)
    assert "hall-world-other" in found.world_model
    wrong = write_episodes(make_episodes(list(range(5, 30)), action_dim=1), tmp_path / "wrong.parquet")
    with pytest.raises(UserError, match="action"):
        evaluate.main([str(run), "--offline", str(wrong)])


def test_options_of_played_episodes_are_refused_with_offline(run: RunFolder) -> None:
    with pytest.raises(UserError, match="--video: no episode is played with --offline"):
        evaluate.main([str(run), "--offline", "--video", "x.gif"])
    with pytest.raises(UserError, match="--clip: no episode is played with --offline"):
        evaluate.main([str(run), "--offline", "--clip"])


def test_a_run_with_an_environment_is_estimated_when_asked_and_auto_means_what_was_recommended(
    tiny_config: RunConfig, tmp_path: Path
) -> None:
    assert not is_estimated(tiny_config)
    plain, found = train_and_estimate(tiny_config)
    assert found is None
    place = RunFolder.of(tiny_config).checkpoint(20)
    with pytest.raises(RunError, match=r"nothing was estimated .* python -m dt_ray.evaluate .*tiny --offline"):
        recommended_target(place)
    with pytest.raises(RunError, match="nothing was estimated"):
        evaluate.main([plain.run, "--target-return", "auto"])

    model = DecisionTransformer.load(plain.run)
    estimates = OfflineReport.from_json(json.dumps(model.evaluate_offline()))
    backed = replace(estimates, best_target=-800.0, supported=(-900.0, -700.0))
    RunFolder.of(tiny_config).write_offline(backed)
    assert recommended_target(place) == -800.0
    file = tmp_path / "auto.json"
    evaluate.main([plain.run, "--target-return", "auto", "--episodes", "2", "--json", str(file)])
    assert json.loads(file.read_text())["targets"][0]["target_return"] == -800.0
    first = [1.0, 0.0, 0.0]
    assert model.predict(first, target_return="auto") == model.predict(first, target_return=-800.0)  # pyright: ignore[reportArgumentType]
    RunFolder.of(tiny_config).write_offline(replace(backed, best_target=None))
    with pytest.raises(RunError, match="no estimate for .* can be believed"):
        recommended_target(place)


def test_a_target_that_the_log_does_not_back_is_warned_of_or_clipped_by_a_flag(
    tiny_config: RunConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = train_and_estimate(tiny_config)[0].run
    model, first = DecisionTransformer.load(run), [1.0, 0.0, 0.0]
    for clips in (
        lambda: evaluate.main([run, "--clip", "--target-return", "-100"]),
        lambda: serve.main([run, "--clip"]),
        lambda: model.predict(first, target_return=-100.0, clip=True),  # pyright: ignore[reportArgumentType]
    ):
        with pytest.raises(RunError, match=r"clip: nothing was estimated .* --offline"):
            clips()
    RunFolder.of(tiny_config).write_offline(
        make_offline_report(step=20, best_target=-800.0, supported=(-900.0, -700.0))
    )
    file = tmp_path / "evaluation.json"
    asked = ["--target-return", "-800", "-100", "--episodes", "2", "--json", str(file)]
    evaluate.main([run, *asked])
    assert "-100 is outside of -900 .. -700" in caplog.text
    assert [target["target_return"] for target in json.loads(file.read_text())["targets"]] == [-800.0, -100.0]
    evaluate.main([run, *asked, "--clip"])
    inside, beyond = json.loads(file.read_text())["targets"]
    assert (beyond["asked_target_return"], beyond["target_return"]) == (-100.0, -700.0)
    assert "asked_target_return" not in inside
    assert EvaluationReport.from_json(file.read_text()).targets[1].asked_target_return == -100.0
    assert "-700 is asked for instead" in caplog.text
    several = np.array([first, first])
    np.testing.assert_array_equal(
        model.predict(several, target_return=np.array([-800.0, -100.0]), clip=True),
        model.predict(several, target_return=np.array([-800.0, -700.0])),
    )


def test_a_world_model_learns_from_all_of_the_log_whatever_the_policy_took_of_it() -> None:
    config = load_config("behavior_cloning/pendulum", ["data.max_episodes=3"])
    data = world_data(config.data, None)
    assert (data.top_fraction, data.max_episodes, data.collect) == (1.0, None, None)
    assert world_data(config.data, "other.parquet").path.endswith("other.parquet")


def test_a_sweep_chosen_by_estimates_needs_all_trials_to_end() -> None:
    with pytest.raises(ConfigError, match="offline_estimate is known when all trials have ended"):
        load_sweep(None, None, ["metric=offline_estimate", "scheduler=asha", "evaluation.every=100"])


def test_a_log_of_one_episode_is_trained_on_and_the_estimate_is_only_missing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = write_episodes(make_episodes([40], action_dim=2), tmp_path / "one.parquet")
    train.main([f"data.path={log}", f"storage_path={tmp_path}", "name=one", *SMALL])
    assert "was not estimated" in caplog.text
    assert (RunFolder(Folder.at(tmp_path / "one")).read_summary() or {})["status"] == "finished"


def test_a_world_model_of_another_log_is_neither_used_nor_replaced_unless_asked(log_file: Path, tmp_path: Path) -> None:
    other = write_episodes(make_episodes(list(range(5, 25)), action_dim=2, seed=3), tmp_path / "other.parquet")
    train.main([f"data.path={other}", f"storage_path={tmp_path}", "name=hall", *SMALL])
    place = tmp_path / "hall"
    again = [f"data.path={log_file}", f"storage_path={tmp_path}", "name=hall", *SMALL]
    train.main([*again, "--overwrite"])
    world = RunFolder(Folder.at(tmp_path / "hall-world"))
    assert world.read_config().data.path == str(log_file)
    train.main([*again, "--overwrite", f"data.path={other}", "evaluation.offline=false"])
    with pytest.raises(RunError, match="is a world model of another log"):
        evaluate.main([str(place), "--offline"])

"""A log and no simulator: trained, resumed, evaluated, exported, reported and served like any other."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.examples import make_episodes, write_episodes

from dt_ray import evaluate, export, report, train
from dt_ray.api import DecisionTransformer
from dt_ray.cli.data import main as data_main
from dt_ray.config.loading import read_settings
from dt_ray.config.schema import EvaluationConfig, RunConfig
from dt_ray.data.held_out import EpisodeStarts, HeldOutEpisodes, LinearCloning, replayed_part
from dt_ray.data.normalizer import Normalizer
from dt_ray.data.spaces import SpaceSpec
from dt_ray.data.transitions import TransitionDataset
from dt_ray.errors import ConfigError, UserError
from dt_ray.jobs.deriving import resolve_settings
from dt_ray.jobs.training import name_run, read_held_out, start_run
from dt_ray.play.held_out import evaluate_held_out, replay
from dt_ray.play.sessions import Sessions
from dt_ray.runs.checkpoint import load_policy
from dt_ray.runs.evaluation_report import EvaluationReport, best_of
from dt_ray.runs.folder import RunFolder, checkpoint_at
from dt_ray.runs.storage import Folder

SMALL = [
    "model.width=16",
    "model.num_layers=1",
    "model.context_length=4",
    "optim.batch_size=8",
    "scaling.num_workers=0",
]
SPEC = SpaceSpec(observation_dim=3, action_dim=2, action_low=(-2.0, -2.0), action_high=(2.0, 2.0))
FROZEN = {"step", "env_id", "num_episodes", "seed", "wall_s", "env_steps_per_s", "targets"}


def linear_log(num_episodes: int, *, seed: int = 0) -> TransitionDataset:
    """Episodes whose actions are a linear function of the observation, and of the step's number in the episode."""
    data = make_episodes(list(range(5, 5 + num_episodes)), action_dim=2, seed=seed)
    data.actions[:] = 0.3 * data.observations[:, :2] - 0.2
    return data


@pytest.fixture(scope="module")
def log_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_episodes(linear_log(20), tmp_path_factory.mktemp("log") / "machine.parquet")


def settings(log_file: Path, storage: Path, *overrides: str) -> list[str]:
    return [f"data.path={log_file}", f"storage_path={storage}", "name=hall", "total_timesteps=20", *SMALL, *overrides]


def test_everything_works_from_the_log_alone(
    log_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train.main(settings(log_file, tmp_path))
    run = RunFolder(Folder.at(tmp_path / "hall"))
    assert "linear cloning" in capsys.readouterr().out
    written = [json.loads(path.read_text()) for path in sorted((tmp_path / "hall/evaluations").glob("step-*.json"))]
    assert [each["step"] for each in written] == [4, 8, 12, 16, 20]
    assert all(set(each) == FROZEN | {"held_out"} and each["targets"] == [] for each in written)
    errors = {each["step"]: each["held_out"]["action_error"] for each in written}
    summary = run.read_summary()
    assert summary is not None
    assert summary["best"]["step"] == min(errors, key=lambda step: errors[step])
    assert set(written[0]["held_out"]) >= {"action_error", "cloning_error", "constant_error", "by_step", "by_return"}

    train.main(["--resume", str(run), "total_timesteps=25"])
    assert RunFolder(run.folder).read_evaluation(25).held_out is not None
    evaluate.main([str(run), "--json", str(tmp_path / "again.json")])
    again = EvaluationReport.from_json((tmp_path / "again.json").read_text())
    assert again.held_out == run.read_evaluation(25).held_out
    model = DecisionTransformer.load(str(run))
    assert model.evaluate()["held_out"] == json.loads((tmp_path / "again.json").read_text())["held_out"]
    export.main([str(run), "--format", "torch", "--out", str(tmp_path / "policy.pt2")])
    report.main([str(run), "--out", str(tmp_path / "report")])
    assert (tmp_path / "report/action_errors.png").stat().st_size > 10_000
    policy, facts = load_policy(checkpoint_at(run.folder))
    assert facts.env_id is None
    assert Sessions(policy, facts.spec) is not None


def test_what_needs_an_environment_says_so(log_file: Path, tmp_path: Path) -> None:
    train.main(settings(log_file, tmp_path, "evaluation.every=0"))
    run = str(tmp_path / "hall")
    model = DecisionTransformer.load(run)
    for refused in (
        lambda: evaluate.main([run, "--target-return", "3"]),
        lambda: evaluate.main([run, "--video", "x.gif"]),
        lambda: report.main([run, "--out", str(tmp_path / "report"), "--video"]),
        lambda: model.evaluate(target_returns=[3.0]),
    ):
        with pytest.raises(ConfigError, match=r"needs an environment, and this run has none \(env_id=null\)"):
            refused()
    collect = ["collect", "--env", "Pendulum-v1", "--behavior", run, "--workers", "0", "--out", str(tmp_path / "data")]
    with pytest.raises(UserError, match="was trained without an environment .* not those of Pendulum-v1"):
        data_main(collect)
    with pytest.raises(ConfigError, match="data.collect: episodes are collected in an environment"):
        train.main(settings(log_file, tmp_path, "env_id=null", "data.collect.behavior=random"))


def test_streamed_data_is_evaluated_on_the_same_episodes(log_file: Path, tmp_path: Path) -> None:
    found = {}
    for residency in ("resident", "streaming"):
        overrides = settings(log_file, tmp_path, f"data.residency={residency}", "data.validation_fraction=0.2")
        config = resolve_settings(read_settings(None, overrides)).config
        found[residency] = read_held_out(name_run(config, "x"))
    one, other = found["resident"], found["streaming"]
    np.testing.assert_array_equal(np.sort(one.episodes.rewards), np.sort(other.episodes.rewards))
    np.testing.assert_allclose(one.cloning.weights, other.cloning.weights, atol=1e-5)


def test_a_log_of_one_episode_trains_and_says_that_nothing_is_evaluated(tmp_path: Path) -> None:
    file = write_episodes(linear_log(1), tmp_path / "one.parquet")
    config = resolve_settings(read_settings(None, settings(file, tmp_path))).config
    assert start_run(name_run(config, "x")).summary["last"] is None
    with pytest.raises(ConfigError, match="there is nothing to evaluate on"):
        read_held_out(name_run(config, "x"))


def test_linear_cloning_finds_a_linear_policy_and_part_by_part_the_same_one() -> None:
    data = linear_log(12)
    units = Normalizer.fit(data, SPEC)
    whole = LinearCloning.fit([data], units)
    parts = LinearCloning.fit([data.select([i]) for i in range(12)], units)
    np.testing.assert_allclose(whole.weights, parts.weights, rtol=1e-9)
    assert np.abs(whole.predict(data, units) - units.normalize_actions(data.actions)).max() < 0.01


class Recalling:
    """Acts by what it was shown: the sum of the last observation and of what the episode still owes."""

    def start(self, observations: np.ndarray, target_returns: np.ndarray) -> None:
        self.observations, self.owed = observations, target_returns.copy()

    def act(self) -> np.ndarray:
        return np.stack([self.observations[:, 0], self.owed], axis=1).astype(np.float32)

    def observe(self, actions: np.ndarray, rewards: np.ndarray, observations: np.ndarray) -> None:
        self.observations, self.owed = observations, self.owed - rewards

    def keep(self, episodes: np.ndarray) -> None:
        self.observations, self.owed = self.observations[episodes], self.owed[episodes]


def test_a_policy_is_shown_each_step_of_each_episode_as_it_was_logged() -> None:
    data = make_episodes([4, 1, 9, 2, 9], action_dim=2)
    data = replayed_part(TransitionDataset(**{**vars(data), "returns_to_go": data.to_go()}))
    chosen = replay(Recalling(), data)
    np.testing.assert_allclose(chosen[:, 0], data.observations[:, 0])
    np.testing.assert_allclose(chosen[:, 1], data.returns_to_go, atol=1e-5)


def test_errors_of_groups_add_up_to_those_of_all_steps_and_the_smaller_one_is_best() -> None:
    data = make_episodes([4, 30, 9, 2, 9], action_dim=2)
    units = Normalizer.fit(data, SPEC)
    episodes = replayed_part(TransitionDataset(**{**vars(data), "returns_to_go": data.to_go()}))
    held_out = HeldOutEpisodes(
        episodes=episodes, cloning=LinearCloning.fit([data], units), normalizer=units, starts=EpisodeStarts.of(data)
    )
    found = evaluate_held_out(Recalling(), held_out, EvaluationConfig(), step=3)
    result = found.held_out
    assert result is not None
    for groups in (result.by_step, result.by_return):
        assert sum(group.num_steps for group in groups) == result.num_steps == 54
        for name in ("action_error", "cloning_error", "constant_error"):
            squares = sum(group.num_steps * getattr(group, name) ** 2 for group in groups)
            assert squares / 54 == pytest.approx(getattr(result, name) ** 2)
    assert result.cloning_error <= result.constant_error, "of the episodes that both were fitted to"
    assert EvaluationReport.from_json(found.to_json()) == found
    assert "held_out" not in EvaluationReport(**{**vars(found), "held_out": None}).to_dict()
    better = replace(found, step=9, held_out=replace(result, action_error=0.01))
    assert best_of([found, better]) == better


def test_long_episodes_are_replayed_by_their_first_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dt_ray.data.held_out.MAX_EPISODE_STEPS", 5)
    data = make_episodes([3, 12, 5], action_dim=2)
    whole = data.to_go()
    part = replayed_part(TransitionDataset(**{**vars(data), "returns_to_go": whole}))
    assert part.lengths.tolist() == [3, 5, 5]
    np.testing.assert_array_equal(part.returns_to_go, np.concatenate([whole[:8], whole[15:]]))


def test_runs_without_an_environment_ask_for_no_evaluation_actors() -> None:
    from dt_ray.distributed.resources import Node, plan_resources

    plan = plan_resources(RunConfig(), [Node(cpus=8, gpus=0)])
    assert (plan.num_actors, plan.notes) == (0, ())

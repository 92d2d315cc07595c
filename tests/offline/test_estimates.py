"""Estimates from a log alone, beside the returns that an environment of known equations gives."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.examples import write_episodes

from dt_ray.config.derived import LogOutline
from dt_ray.config.loading import read_settings
from dt_ray.config.schema import EvaluationConfig, ModelConfig, WorldModelConfig
from dt_ray.data.held_out import EpisodeStarts
from dt_ray.data.normalizer import Normalizer
from dt_ray.data.spaces import SpaceSpec
from dt_ray.data.transitions import TransitionDataset
from dt_ray.errors import ConfigError, UserError
from dt_ray.jobs.deriving import resolve_settings
from dt_ray.jobs.offline import load_world
from dt_ray.jobs.training import name_run, start_run
from dt_ray.learners.world_model import sizes_for
from dt_ray.models.world_model import QUANTILES, STD_RANGE, WorldModel
from dt_ray.offline.estimates import (
    World,
    best_target,
    estimate_returns,
    member_weights,
    reasons_to_doubt,
    supported_share,
    supported_targets,
)
from dt_ray.offline.learned_environments import LearnedEnvironments
from dt_ray.runs.checkpoint import load_policy, read_facts
from dt_ray.runs.folder import checkpoint_at
from dt_ray.runs.offline_report import Diagnostics, OfflineReport, OfflineTarget
from dt_ray.runs.storage import Folder

STEPS = 20
SPEC = SpaceSpec(observation_dim=1, action_dim=1, action_low=(-1.0,), action_high=(1.0,))
GOOD = Diagnostics(estimate=5.0, half_width=1.0, disagreement=1.0, fragility=0.1, share_cut=0.0, mean_length=9.0)


def play(act: Callable[[np.ndarray], np.ndarray], num: int, *, seed: int) -> TransitionDataset:
    """A cart at s, which an action moves by 0.3 a; it earns 1 - s² a step, and leaves the track beyond 2."""
    random = np.random.default_rng(seed)
    columns: dict[str, list[np.ndarray]] = {"observations": [], "actions": [], "rewards": []}
    starts, terminated, finals = [], [], []
    for _ in range(num):
        place, begin = random.uniform(-1.5, 1.5), len(columns["rewards"])
        starts.append(begin)
        for step in range(STEPS):
            action = np.clip(act(np.array([[place]]))[0] + 0.0, -1, 1)
            columns["observations"].append(np.array([place]))
            columns["actions"].append(action)
            columns["rewards"].append(np.float64(1 - place**2))
            place += 0.3 * action[0]
            over = abs(place) > 2
            terminated.append(over)
            if over or step + 1 == STEPS:
                finals.append(np.array([place]))
                break
    truncated = np.zeros(len(terminated), bool)
    truncated[[*(np.array(starts[1:]) - 1), -1]] = True
    return TransitionDataset(
        **{name: np.array(values, np.float32) for name, values in columns.items()},
        starts=np.array(starts),
        terminated=np.array(terminated),
        truncated=truncated & ~np.array(terminated),
        final_observations=np.array(finals, np.float32),
    )


def to_the_middle(gain: float) -> Callable[[np.ndarray], np.ndarray]:
    return lambda observations: np.clip(-gain * observations, -1, 1)


class Plain:
    """A policy of the observation alone."""

    return_scale = 0.0

    def __init__(self, act: Callable[[np.ndarray], np.ndarray]) -> None:
        self.rule = act

    def start(self, observations: np.ndarray, target_returns: np.ndarray) -> None:
        self.observations = observations

    def act(self) -> np.ndarray:
        return self.rule(self.observations).astype(np.float32)

    def observe(self, actions: np.ndarray, rewards: np.ndarray, observations: np.ndarray) -> None:
        self.observations = observations

    def keep(self, episodes: np.ndarray) -> None:
        self.observations = self.observations[episodes]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A world model of episodes with random actions."""
    folder = tmp_path_factory.mktemp("world")
    random = np.random.default_rng(7)
    log = write_episodes(play(lambda seen: random.uniform(-1, 1, (1, 1)), 150, seed=1), folder / "cart.parquet")
    overrides = [f"data.path={log}", f"storage_path={folder}", "name=world", "scaling.num_workers=0"]
    size = ["model.width=32", "model.num_layers=2", "optim.batch_size=320", "total_timesteps=800", "env_id=null"]
    bounds = "data.action_bounds=[[-1.0], [1.0]]"
    config = resolve_settings(read_settings("world_model/neutral", [*overrides, *size, bounds])).config
    checkpoint = checkpoint_at(Folder.at(start_run(name_run(config, "world")).run))
    return load_world(checkpoint, read_facts(checkpoint).spec)


EVALUATION = EvaluationConfig(target_returns=(0.0,), num_episodes=200, max_timesteps=STEPS)


def test_policies_are_ranked_as_the_environment_ranks_them_and_lie_in_their_intervals(world: World) -> None:
    found = {}
    for gain in (-1.0, 0.0, 0.3, 1.0):
        (target,) = estimate_returns(Plain(to_the_middle(gain)), world, EVALUATION, step=1).targets
        true = float(play(to_the_middle(gain), 400, seed=9).episode_returns.mean())
        found[true] = target.diagnostics.estimate
        assert target.diagnostics.estimate == pytest.approx(true, abs=max(3.0, target.diagnostics.half_width))
    assert [found[true] for true in sorted(found)] == sorted(found.values())


def test_a_policy_that_is_asked_for_nothing_has_one_estimate_and_no_support(world: World) -> None:
    report = estimate_returns(Plain(to_the_middle(1.0)), world, replace(EVALUATION, target_returns=(1.0, 2.0)), step=3)
    (target,) = report.targets
    assert target.supported_share is None
    assert target.nearest_episodes == ()
    assert report.best_target == 1.0
    assert report.score == target.estimated_return
    assert OfflineReport.from_json(report.to_json()) == report


def test_where_the_log_has_nothing_the_estimate_is_doubted_and_no_number_is_given(world: World) -> None:
    elsewhere = EpisodeStarts(
        observations=np.full((40, 1), 30.0, np.float32),
        returns=world.held_out.starts.returns[:40],
        asked=world.held_out.starts.asked[:40],
        episode_ids=np.arange(40),
    )
    far = replace(world, held_out=replace(world.held_out, starts=elsewhere))
    (target,) = estimate_returns(Plain(to_the_middle(0.0)), far, EVALUATION, step=1).targets
    assert target.doubts
    assert target.estimated_return is None
    assert target.interval90 is None
    assert target.verdict.startswith("no estimate: ")


def test_impossible_targets_are_not_supported_and_logged_ones_are(world: World) -> None:
    starts = world.held_out.starts
    observations = torch.as_tensor(world.normalizer.normalize_observations(starts.observations))
    with torch.no_grad():
        quantiles = world.model.return_quantiles(observations, torch.zeros(len(observations), dtype=torch.int64))
    quantiles = np.sort(quantiles.numpy(), axis=1) / world.normalizer.return_scale
    logged = (quantiles[:, 0] <= starts.returns) & (starts.returns <= quantiles[:, -1])
    assert logged.mean() > 0.85
    assert supported_share(STEPS + 1.0, quantiles) == 0.0  # more than 1 a step
    assert supported_share(-1000.0, quantiles) == 0.0
    assert supported_share(math.inf, quantiles) == 1.0
    low, high = supported_targets(quantiles)
    assert starts.returns.min() <= low < high <= STEPS


@given(st.integers(1, 9), st.integers(1, 5), st.integers(2, 7))
def test_weights_are_means_of_all_members_of_one_and_of_the_others(num: int, few: int, members: int) -> None:
    weights = member_weights(num, few, members)
    assert weights.shape == (num + few + 2 * few * members, members)
    np.testing.assert_allclose(weights.sum(dim=1), 1.0, rtol=1e-6)
    alone, others = weights[num:-few].reshape(2, members, few, members).unbind()
    assert (weights[:num] == 1 / members).all()
    assert (weights[-few:] == 1 / members).all()
    for member in range(members):
        assert (alone[member, :, member] == 1).all()
        assert (others[member, :, member] == 0).all()


def constant_world(change: float, *, ends_above: float) -> WorldModel:
    """A world model of 2 members in which every observation grows by `change`, and ends above a place."""
    model = WorldModel(1, 1, ModelConfig(num_layers=1, width=4, max_timesteps=9), WorldModelConfig(num_members=2))
    for parameter in model.parameters():
        parameter.data.zero_()
    model.step[-1].bias.data[:, 0, 0] = change
    model.step[-1].bias.data[:, 0, 1] = 2.0  # the reward
    first, middle, last = (layer for layer in model.end if hasattr(layer, "bias"))
    first.weight.data[:, 0, 0], first.bias.data[:, 0, 0] = 1000.0, -1000.0 * ends_above
    middle.weight.data[:, 0, 0] = 1.0
    last.weight.data[:, 0, 0], last.bias.data[:, 0, 0] = 1.0, -1.0
    model.returns[-1].bias.data[:] = torch.arange(len(QUANTILES)).float()
    return model


UNITS = Normalizer.of(np.zeros(1), np.ones(1), SPEC, return_scale=0.5)


def test_an_episode_follows_the_mean_of_its_members_until_the_observation_after_a_step_ends_it() -> None:
    model = constant_world(1.0, ends_above=2.5)
    model.step[-1].bias.data[1, 0, 0] = 0.5  # the second member
    envs = LearnedEnvironments(
        model, UNITS, np.zeros((2, 1)), torch.tensor([[0.5, 0.5], [1.0, 0.0]]), disagreement_limit=9.0
    )
    envs.reset([0, 1])
    first = envs.step(np.arange(2), np.zeros((2, 1), np.float32))
    np.testing.assert_allclose(first.observations[:, 0], [0.75, 1.0], rtol=1e-6)
    np.testing.assert_allclose(first.rewards, [4.0, 4.0])  # 2 in the model's units, half of the environment's
    second = envs.step(np.arange(2), np.zeros((2, 1), np.float32))
    third = envs.step(np.arange(2), np.zeros((2, 1), np.float32))
    assert not second.terminated.any()
    assert third.terminated.tolist() == [False, True]


def test_noise_adds_the_models_own_errors_and_nothing_to_the_other_episodes() -> None:
    model = constant_world(1.0, ends_above=50.0)
    weights, noise = torch.full((400, 2), 0.5), (torch.arange(400) >= 200).float()
    envs = LearnedEnvironments(model, UNITS, np.zeros((400, 1)), weights, disagreement_limit=9.0, noise=noise)
    envs.reset(range(400))
    outcome = envs.step(np.arange(400), np.zeros((400, 1), np.float32))
    plain, noisy = outcome.observations[:200, 0], outcome.observations[200:, 0]
    np.testing.assert_allclose(plain, 1.0, rtol=1e-6)
    expected = math.sqrt(STD_RANGE[0] * STD_RANGE[1])  # the middle of the range, where the outputs are 0
    assert noisy.std() == pytest.approx(expected, rel=0.2)
    assert noisy.mean() == pytest.approx(1.0, abs=expected / 3)


def test_where_the_members_disagree_too_much_an_episode_ends_with_the_logs_median_return() -> None:
    model = constant_world(1.0, ends_above=50.0)
    model.step[-1].bias.data[1, 0, 0] = -1.0
    envs = LearnedEnvironments(model, UNITS, np.zeros((1, 1)), torch.full((1, 2), 0.5), disagreement_limit=0.1)
    envs.reset([0])
    outcome = envs.step(np.arange(1), np.zeros((1, 1), np.float32))
    assert outcome.terminated.all()
    assert envs.is_cut.all()
    np.testing.assert_allclose(outcome.rewards, QUANTILES.index(0.5) / 0.5)
    np.testing.assert_allclose(envs.cut_ranges, (len(QUANTILES) - 1) / 0.5)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({}, None),
        ({"estimate": math.nan}, "did not stay finite"),
        ({"share_cut": 0.5}, "50% of the rollouts left what the log has"),
        ({"disagreement": 9.0}, "disagree 9.0 times as much"),
        ({"fragility": 0.8}, "earn 80% less or more"),
        ({"half_width": 60.0}, "± 60% of the range"),
    ],
)
def test_an_estimate_is_doubted_with_its_reason(changes: dict[str, float], says: str | None) -> None:
    reasons = reasons_to_doubt(replace(GOOD, **changes), 100.0)
    assert (reasons == []) if says is None else (says in "; ".join(reasons))


def estimated(target_return: float, value: float | None, share: float) -> OfflineTarget:
    return OfflineTarget(
        target_return=target_return,
        estimated_return=value,
        interval90=None if value is None else (value, value),
        supported_share=share,
        nearest_episodes=(),
        nearest_returns=(),
        doubts=() if value is not None else ("no",),
        diagnostics=GOOD,
    )


def test_the_recommended_target_has_the_highest_estimate_of_those_that_are_backed_and_believed() -> None:
    found = [estimated(9.0, 8.0, 0.2), estimated(7.0, 5.0, 0.9), estimated(6.0, 6.0, 0.9), estimated(8.0, None, 1.0)]
    assert best_target(found) == 6.0
    assert best_target([found[0], found[3]]) is None


def outline(dims: int, steps: int) -> LogOutline:
    limits = np.zeros(1, bool)
    return LogOutline(
        observation_dim=dims, action_low=-np.ones(1), action_high=np.ones(1), is_low_a_limit=limits,
        is_high_a_limit=limits, may_be_choices=False, may_be_one_hot=False, lengths=np.array([steps]),
        returns=np.zeros(1), largest_to_go=1.0,
    )  # fmt: skip


def test_more_dimensions_get_larger_networks_and_short_logs_shorter_trainings() -> None:
    small, large = ({each.key: each.value for each in sizes_for(outline(dims, 10**6))} for dims in (3, 11))
    assert small["model.width"] < large["model.width"]
    assert small["total_timesteps"] < large["total_timesteps"]
    (short,) = (each.value for each in sizes_for(outline(3, 100)) if each.key == "total_timesteps")
    assert short < small["total_timesteps"]


def test_a_world_model_does_not_act_and_a_policy_is_no_world_model(world: World, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a world model does not act"):
        load_policy(Folder(world.place))
    with pytest.raises(ConfigError, match="the policy has 3 observation and 1 action dimensions"):
        load_world(Folder(world.place), replace(SPEC, observation_dim=3))


def test_the_nearest_episodes_go_by_the_target_return_that_corresponds_to_them() -> None:
    data = play(to_the_middle(0.5), 9, seed=2)
    starts = EpisodeStarts.of(data, discount=0.9)
    np.testing.assert_allclose(starts.asked, data.to_go(0.9)[data.starts])
    np.testing.assert_allclose(starts.returns, data.episode_returns)
    for episode in range(9):
        assert starts.asked[starts.nearest(float(starts.asked[episode]), 1)[0]] == starts.asked[episode]
    assert starts.nearest(math.inf, 1)[0] == starts.asked.argmax()

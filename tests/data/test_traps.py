"""What a log hides is said, with the setting that mends it; a sound log raises no suspicion."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from support.examples import make_episodes, write_episodes

from dt_ray.config.schema import DataConfig
from dt_ray.data import TransitionDataset, read_dataset
from dt_ray.data.description.traps import all_traps, replay_errors
from dt_ray.data.spaces import SpaceSpec, read_spaces
from dt_ray.environments.batched import known_state_of
from dt_ray.errors import DataError


@pytest.fixture(scope="module")
def pendulum(pendulum_data: Path) -> TransitionDataset:
    return read_dataset(DataConfig(path=str(pendulum_data)))


def traps_of(data: TransitionDataset, env_id: str = "Pendulum-v1") -> str:
    return "\n".join(all_traps(data, read_spaces(env_id), env_id, state_of=known_state_of(env_id)))


def test_a_sound_log_raises_no_suspicion(pendulum: TransitionDataset) -> None:
    assert traps_of(pendulum) == ""


def test_actions_in_the_policys_units_are_found_by_replaying_the_dynamics(pendulum: TransitionDataset) -> None:
    found = traps_of(replace(pendulum, actions=pendulum.actions / 2))
    assert "the scale of the actions looks wrong" in found
    assert "set data.action_scale=2" in found


def test_small_actions_in_the_environments_units_are_not_taken_for_scaled_ones() -> None:
    env = gym.make("Pendulum-v1")
    observation, _ = env.reset(seed=0)
    rows = []
    for torque in np.random.default_rng(0).uniform(-0.5, 0.5, size=(50, 1)).astype(np.float32):
        following, reward, *_ = env.step(torque)
        rows.append((observation, torque, float(reward)))
        observation = following
    observations, actions, rewards = (np.array(column, np.float32) for column in zip(*rows, strict=True))
    data = TransitionDataset(observations=observations, actions=actions, rewards=rewards, starts=np.zeros(1, int))
    assert traps_of(data) == ""


@pytest.mark.parametrize("env_id", ["MountainCarContinuous-v0", "ShownState-v0"])
def test_an_environment_whose_state_is_its_observation_is_replayed(env_id: str) -> None:
    data = play(env_id, num_steps=60)
    assert traps_of(data, env_id) == ""
    doubled = replace(data, observations=2 * data.observations)
    assert f"{env_id} does not go from these observations to the next ones" in traps_of(doubled, env_id)


@pytest.mark.parametrize("env_id", ["HiddenState-v0", "support.quirky_environments:Plain-v0", "FailingState-v0"])
def test_an_environment_that_hides_its_state_is_not_replayed(env_id: str) -> None:
    data = play("ShownState-v0", num_steps=60)
    assert replay_errors(data, env_id, [1.0]) is None


class ShownState(gym.Env):
    """A point that is pushed."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,))
    action_space = gym.spaces.Box(-1, 1, (1,))
    hidden = 0.0

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.state, self.push = self.np_random.uniform(-1, 1, 2), 0.0
        return self.state.astype(np.float32), {}

    def step(self, action: Any) -> Any:
        place, velocity = self.state
        self.push = float(action[0]) + self.hidden * self.push
        self.state = np.array([place + 0.1 * velocity, 0.9 * velocity + 0.1 * self.push])
        return self.state.astype(np.float32), -abs(float(place)), False, False, {}


class HiddenState(ShownState):
    """Its last push acts on, and nothing shows it."""

    hidden = 0.9


class FailingState(ShownState):
    """No state can be set."""

    state = property(lambda self: np.zeros(2))


for kind in (ShownState, HiddenState, FailingState):
    gym.register(f"{kind.__name__}-v0", kind)


def play(env_id: str, *, num_steps: int) -> TransitionDataset:
    """An episode of random actions."""
    env = gym.make(env_id, disable_env_checker=True)
    env.action_space.seed(1)
    observation, _ = env.reset(seed=1)
    rows = []
    for _ in range(num_steps):
        action = env.action_space.sample()
        following, reward, *_ = env.step(action)
        rows.append((observation, action, reward))
        observation = following
    observations, actions, rewards = (np.array(column, np.float32) for column in zip(*rows, strict=True))
    return TransitionDataset(observations=observations, actions=actions, rewards=rewards, starts=np.zeros(1, int))


def test_normalised_observations_are_found(pendulum: TransitionDataset) -> None:
    mean, std = pendulum.observations.mean(axis=0), pendulum.observations.std(axis=0)
    found = traps_of(replace(pendulum, observations=(pendulum.observations - mean) / std))
    assert "does not go from these observations to the next ones" in found
    assert "outside what Pendulum-v1 can show" in found


def test_rows_in_another_order_are_found(pendulum: TransitionDataset) -> None:
    order = np.random.default_rng(0).permutation(pendulum.num_transitions)
    shuffled = replace(pendulum, observations=pendulum.observations[order], actions=pendulum.actions[order])
    assert "in another order" in traps_of(shuffled)


def test_a_time_limit_that_calls_itself_a_terminal_is_found() -> None:
    data = make_episodes([200, 200, 30])
    wrong = replace(data, terminated=data.truncated, truncated=data.terminated)
    assert "2 episode(s) are said to be ended by the environment at step 200" in traps_of(wrong)
    assert "data.time_limit=200" in traps_of(wrong)
    assert "time limit" not in traps_of(wrong.with_time_limit(200))
    without_env = list(all_traps(wrong.select([0, 1])))
    assert "data.time_limit=200" in without_env[0]


def test_rows_that_are_there_twice_are_found(pendulum: TransitionDataset) -> None:
    rows = np.insert(np.arange(pendulum.num_transitions), 61, 60)
    starts = pendulum.starts + (pendulum.starts > 60)
    columns = {name: getattr(pendulum, name)[rows] for name in ("observations", "actions", "rewards", "truncated")}
    doubled = TransitionDataset(**columns, starts=starts, episode_ids=pendulum.episode_ids)
    assert "1 row(s) repeat the one before, the first in episode 1 at step 11" in traps_of(doubled)


def test_samples_far_past_the_bounds_are_refused_or_clipped(tmp_path: Path) -> None:
    spec = SpaceSpec(observation_dim=3, action_dim=1, action_low=(-2.0,), action_high=(2.0,))
    data = make_episodes([6, 7])
    data.actions[3] = 17.0
    path = str(write_episodes(data, tmp_path / "log.parquet"))
    with pytest.raises(DataError, match=r"episode 0, step 3: action \[17.\] is outside the environment's bounds"):
        read_dataset(DataConfig(path=path), spec)
    clipped = read_dataset(DataConfig(path=path, out_of_bounds="clip"), spec)
    np.testing.assert_array_equal(clipped.actions, np.clip(data.actions, -2, 2))

from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces

from dt_ray.config.schema import DataConfig, EvaluationConfig
from dt_ray.data import read_dataset
from dt_ray.data.spaces import SpaceSpec, make_env, read_spaces
from dt_ray.environments.batched import make_environments
from dt_ray.environments.behaviors import make_behavior
from dt_ray.environments.checked import GymnasiumEnvironments
from dt_ray.environments.pendulum import PendulumEnvironments
from dt_ray.errors import DataError, UnsupportedSpaceError, UserError
from dt_ray.play.collection import CollectionPlan, collect_chunk, collect_here, write_dataset
from dt_ray.play.evaluation import evaluate, make_report, normalized_score, play
from dt_ray.play.rollout import Rollouts, rollout
from dt_ray.runs.intervals import bootstrap_interval


class CountdownEnv(gym.Env):
    """Ends by itself after 3 + seed % 4 steps, with a reward of 1 each: an environment of uneven episodes."""

    observation_space = spaces.Box(-1, 1, (2,), np.float32)
    action_space = spaces.Box(-3, 3, (2,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        self.left = 3 + (seed or 0) % 4
        return np.zeros(2, np.float32), {}

    def step(self, action):
        self.left -= 1
        return np.full(2, self.left / 10, np.float32), 1.0, self.left == 0, False, {}


@pytest.fixture(scope="module", autouse=True)
def countdown() -> None:
    gym.register("Countdown-v0", CountdownEnv)
    gym.register("Discrete-v0", lambda: gym.make("CartPole-v1").unwrapped)


def play_behavior(env_id: str, seeds: list[int], name: str = "random", *, max_timesteps: int) -> Rollouts:
    policy = make_behavior(name, env_id, read_spaces(env_id), seeds=seeds)
    return rollout(policy, env_id, seeds=seeds, target_returns=[0] * len(seeds), max_timesteps=max_timesteps)


def test_a_rollout_is_what_the_environment_does() -> None:
    seeds = [100_000, 100_001]
    rollouts = play_behavior("Pendulum-v1", seeds, max_timesteps=300)
    assert rollouts.lengths.tolist() == [200, 200]  # the environment's own limit
    env = make_env("Pendulum-v1")
    for i, seed in enumerate(seeds):
        observation, _ = env.reset(seed=seed)
        for t in range(200):
            np.testing.assert_array_equal(rollouts.observations[i, t], observation)
            observation, reward, *_ = env.step(rollouts.actions[i, t])
            assert rollouts.rewards[i, t] == float(reward)
        np.testing.assert_array_equal(rollouts.final_observations[i], observation)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_batched_pendulum_is_gymnasiums_bit_for_bit(dtype: type) -> None:
    """Every step of every episode, with episodes dropped on the way and torques out of bounds."""
    seeds = list(range(24))
    ours, theirs = (make_environments("Pendulum-v1", 24, batched=batched) for batched in (True, False))
    assert isinstance(ours, PendulumEnvironments)
    assert isinstance(theirs, GymnasiumEnvironments)
    np.testing.assert_array_equal(ours.reset(seeds), theirs.reset(seeds))
    live, generator = np.arange(24), np.random.default_rng(0)
    for step in range(200):
        torques = generator.uniform(-3, 3, size=(len(live), 1)).astype(dtype)
        one, other = ours.step(live, torques), theirs.step(live, torques)
        for name, values in vars(one).items():
            np.testing.assert_array_equal(values, getattr(other, name), err_msg=f"{name} at step {step}")
        if step % 50 == 49:
            live = live[::2]


def test_a_pendulum_that_someone_else_registered_is_theirs() -> None:
    spec = gym.registry["Pendulum-v1"]
    try:
        gym.registry["Pendulum-v1"] = gym.envs.registration.EnvSpec("Pendulum-v1", entry_point=CountdownEnv)
        assert isinstance(make_environments("Pendulum-v1", 2), GymnasiumEnvironments)
        gym.registry["Pendulum-v1"] = replace(spec, max_episode_steps=50)
        assert isinstance(make_environments("Pendulum-v1", 2), GymnasiumEnvironments)
    finally:
        gym.registry["Pendulum-v1"] = spec


def test_episodes_of_uneven_length_end_on_their_own() -> None:
    seeds = list(range(8))
    rollouts = play_behavior("Countdown-v0", seeds, max_timesteps=5)
    assert rollouts.lengths.tolist() == [3, 4, 5, 5, 3, 4, 5, 5]
    assert rollouts.returns.tolist() == [3, 4, 5, 5, 3, 4, 5, 5]
    assert rollouts.terminated.tolist() == [True, True, True, False] * 2  # 6 steps don't fit into 5: cut, not ended
    data = rollouts.to_dataset(seeds)
    assert data.lengths.tolist() == rollouts.lengths.tolist()
    assert data.terminated[data.ends - 1].tolist() == rollouts.terminated.tolist()
    assert (data.terminated ^ data.truncated)[data.ends - 1].all()
    assert data.final_observations is not None
    np.testing.assert_allclose(data.final_observations[:4, 0], [0, 0, 0, 0.1])


def test_an_episode_is_the_same_whoever_plays_beside_it() -> None:
    seeds = [100_003, 100_007, 100_011]
    together = play_behavior("Pendulum-v1", seeds, "mixed", max_timesteps=40)
    for i, seed in enumerate(seeds):
        alone = play_behavior("Pendulum-v1", [seed], "mixed", max_timesteps=40)
        np.testing.assert_array_equal(alone.actions[0], together.actions[i])


@pytest.mark.parametrize(
    ("behavior", "low", "high"), [("expert", -165, -130), ("medium", -900, -500), ("random", -1400, -1100)]
)
def test_pendulum_behaviours_are_as_good_as_their_names(behavior: str, low: float, high: float) -> None:
    seeds = list(range(100_000, 100_060))
    rollouts = play_behavior("Pendulum-v1", seeds, behavior, max_timesteps=200)
    assert low < rollouts.returns.mean() < high


def test_mixed_episodes_are_of_every_quality() -> None:
    seeds = list(range(100_000, 100_200))
    rollouts = play_behavior("Pendulum-v1", seeds, "mixed", max_timesteps=200)
    counts, _ = np.histogram(rollouts.returns, bins=[-2000, -1000, -700, -400, -200, 0])
    assert (counts >= 5).all()


class Constant:
    """Acts with the target return that it was given, over 100."""

    def start(self, observations, target_returns) -> None:
        self.actions = np.asarray(target_returns, np.float32)[:, None] / 100

    def act(self):
        return self.actions

    def observe(self, actions, rewards, observations) -> None: ...

    def keep(self, episodes) -> None:
        self.actions = self.actions[episodes]


CONFIG = EvaluationConfig(
    target_returns=(-50, 150), num_episodes=5, max_timesteps=30, random_return=-200, reference_return=-100
)


def test_a_report_has_the_published_form_and_the_episodes_of_each_target() -> None:
    report = evaluate(Constant(), "Pendulum-v1", CONFIG, step=7).to_dict()
    assert list(report) == ["step", "env_id", "num_episodes", "seed", "wall_s", "env_steps_per_s", "targets"]
    assert [target["target_return"] for target in report["targets"]] == [-50, 150]
    env = make_env("Pendulum-v1")
    for target in report["targets"]:
        for episode in range(5):
            env.reset(seed=episode)
            expected = sum(float(env.step(np.array([target["target_return"] / 100], np.float32))[1]) for _ in range(30))
            assert target["episode_returns"][episode] == pytest.approx(expected)
        assert target["return_mean"] == pytest.approx(np.mean(target["episode_returns"]))
        assert target["return_std"] == pytest.approx(np.std(target["episode_returns"]))
        assert target["episode_lengths"] == [30] * 5
        assert target["normalized_score"] == pytest.approx((target["return_mean"] + 200) / 100)


@pytest.mark.parametrize("num_actors", [1, 2, 3])
def test_a_report_is_the_same_however_the_episodes_are_shared(num_actors: int) -> None:
    shares = [range(i, 5, num_actors) for i in range(num_actors)]
    parts = [play(Constant(), "Pendulum-v1", CONFIG, share) for share in shares]
    shared = make_report(parts, "Pendulum-v1", CONFIG, step=0, wall_s=1.0)
    assert shared.targets == evaluate(Constant(), "Pendulum-v1", CONFIG, step=0).targets


def test_the_interval_covers_the_mean_at_its_rate() -> None:
    generator = np.random.default_rng(1)
    covered = 0
    for _ in range(60):
        low, high = bootstrap_interval(generator.normal(3.0, 2.0, size=60))
        covered += low < 3.0 < high
    assert 50 <= covered <= 60


def test_no_score_without_both_ends() -> None:
    assert normalized_score(-100, EvaluationConfig()) is None
    assert normalized_score(-150, CONFIG) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("env_id", "message"),
    [
        (
            "CartPole-v1",
            r"CartPole-v1 has actions Discrete\(2\); dt_ray trains on vector observations and continuous actions only",
        ),
        ("CarRacing-v3", "CarRacing-v3"),
        ("Nowhere-v0", "can't make the environment 'Nowhere-v0'"),
    ],
)
def test_environments_out_of_scope_are_refused(env_id: str, message: str) -> None:
    with pytest.raises(UnsupportedSpaceError, match=message):
        read_spaces(env_id)


def test_images_are_refused() -> None:
    class Images(CountdownEnv):
        observation_space = spaces.Box(0, 255, (8, 8, 3), np.uint8)

    gym.register("Images-v0", Images)
    with pytest.raises(UnsupportedSpaceError, match="no discrete actions and no images"):
        read_spaces("Images-v0")


def test_evaluation_seeds_are_never_collected() -> None:
    with pytest.raises(UserError, match="the seeds 0..9999 are for evaluation"):
        CollectionPlan(env_id="Pendulum-v1", behavior="random", num_episodes=1, seed=9_999).check()


def test_behaviours_that_do_not_exist_are_refused() -> None:
    with pytest.raises(UserError, match="exists for Pendulum-v1 only"):
        play_behavior("Countdown-v0", [0], "expert", max_timesteps=1)
    with pytest.raises(UserError, match="no behaviour 'nobody'; it is one of random, expert, medium, mixed"):
        CollectionPlan(env_id="Pendulum-v1", behavior="nobody", num_episodes=1, seed=10_000).check()
    with pytest.raises(UserError, match="can't load the behaviour 'nowhere:act'"):
        play_behavior("Pendulum-v1", [0], "nowhere:act", max_timesteps=1)


def push(observation: np.ndarray, generator: np.random.Generator) -> list[float]:
    return [float(np.sign(observation[0])), generator.uniform()]


def test_any_function_can_collect_in_any_environment(tmp_path) -> None:
    plan = CollectionPlan(env_id="Countdown-v0", behavior=f"{__name__}:push", num_episodes=3, seed=10_000)
    plan.check()
    write_dataset(str(tmp_path / "data"), collect_here(plan), source=plan.source)
    data = read_dataset(DataConfig(path=str(tmp_path / "data")), read_spaces("Countdown-v0"))
    assert data.num_episodes == 3
    assert ((data.actions[:, 1] > 0) & (data.actions[:, 1] < 1)).all()


def test_a_dataset_appears_whole_or_not_at_all(tmp_path) -> None:
    plan = CollectionPlan(env_id="Countdown-v0", behavior="random", num_episodes=150, seed=10_000)

    def fails():
        yield collect_chunk(plan, plan.chunks()[0])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_dataset(str(tmp_path / "data"), fails(), source="")
    assert list(tmp_path.iterdir()) == []
    summary = write_dataset(str(tmp_path / "data"), collect_here(plan), source=plan.source)
    assert summary.rows()["episodes"] == "150"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "data.README.md"]
    with pytest.raises(DataError, match="exists already"):
        write_dataset(str(tmp_path / "data"), collect_here(plan), source=plan.source)


def test_specs_compare_by_value() -> None:
    assert read_spaces("Countdown-v0") == SpaceSpec(
        observation_dim=2, action_dim=2, action_low=(-3, -3), action_high=(3, 3)
    )


def test_mujoco_environments_are_collected(tmp_path: Path) -> None:
    plan = CollectionPlan(env_id="Hopper-v5", behavior="random", num_episodes=3, seed=10_000, max_timesteps=1000)
    write_dataset(str(tmp_path / "hopper"), collect_here(plan), source=plan.source)
    data = read_dataset(DataConfig(path=str(tmp_path / "hopper")), read_spaces("Hopper-v5"))
    assert (data.num_episodes, data.observations.shape[1], data.actions.shape[1]) == (3, 11, 3)
    assert data.terminated[data.ends - 1].all()  # a hopper that acts at random falls

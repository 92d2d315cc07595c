import math
import platform
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from support.examples import make_episodes

from dt_ray.api import IQL, BehaviorCloning, DecisionTransformer
from dt_ray.config.schema import IQLConfig, OptimConfig, RunConfig
from dt_ray.data.spaces import SpaceSpec
from dt_ray.data.transitions import TransitionDataset
from dt_ray.errors import ConfigError, ResourceError
from dt_ray.jobs.training import resume_run, resumed_config, start_run
from dt_ray.learners import LEARNERS, declaration_of, learner_class
from dt_ray.learners.base import learning_rate_at, make_optimizer
from dt_ray.learners.decision_transformer import DecisionTransformerLearner
from dt_ray.learners.iql import IQLLearner
from dt_ray.losses import expectile_loss, iql_losses
from dt_ray.models.actor_critic import Transitions
from dt_ray.runs.folder import RunFolder
from dt_ray.training.resident import ResidentData, ResidentSource


def make_learner(config: RunConfig, pendulum_spec: SpaceSpec) -> tuple[DecisionTransformerLearner, ResidentSource]:
    source = ResidentSource(ResidentData.build(make_episodes([30] * 8), pendulum_spec, config), config)
    return DecisionTransformerLearner(config, source.spec, source.normalizer), source


def test_updates_lower_the_loss(tiny_config: RunConfig, pendulum_spec: SpaceSpec) -> None:
    config = replace(tiny_config, model=replace(tiny_config.model, dropout=0.0), total_timesteps=60)
    learner, source = make_learner(config, pendulum_spec)
    batch = source.batch(0)
    losses = [float(learner.update(batch)["loss"]) for _ in range(60)]
    assert losses[-1] < 0.7 * losses[0]


def test_metrics_are_named(tiny_config: RunConfig, pendulum_spec: SpaceSpec) -> None:
    learner, source = make_learner(tiny_config, pendulum_spec)
    names = {"loss", "action_absolute_error", "mask_fraction", "gradient_norm", "learning_rate"}
    assert set(learner.update(source.batch(0))) == names


def test_an_update_is_a_function_of_seed_step_and_rank(tiny_config: RunConfig, pendulum_spec: SpaceSpec) -> None:
    """Dropout included, whatever random numbers were drawn in between."""
    (one, source), (two, _) = (make_learner(tiny_config, pendulum_spec) for _ in range(2))
    for step in range(3):
        first = one.update(source.batch(step))["loss"]
        torch.rand(step + 1)
        assert first == two.update(source.batch(step))["loss"]
    two.rank = 1
    assert one.update(source.batch(3))["loss"] != two.update(source.batch(3))["loss"]


def test_the_learning_rate_warms_up_and_decays_to_nothing() -> None:
    cosine = OptimConfig(learning_rate=1.0, warmup_steps=10, schedule="cosine")
    rates = [learning_rate_at(step, cosine, total=110) for step in range(111)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert rates[60] == pytest.approx(0.5)
    assert rates[110] == pytest.approx(0.0)
    assert all(later <= earlier for earlier, later in zip(rates[10:], rates[11:], strict=False))
    constant = replace(cosine, schedule="constant")
    assert [learning_rate_at(step, constant, total=110) for step in (10, 60, 109)] == [1.0, 1.0, 1.0]


def test_gradients_are_clipped_to_their_norm(tiny_config: RunConfig, pendulum_spec: SpaceSpec) -> None:
    config = replace(tiny_config, optim=replace(tiny_config.optim, gradient_clip=1e-3))
    learner, source = make_learner(config, pendulum_spec)
    reported = float(learner.update(source.batch(0))["gradient_norm"])
    gradients = torch.cat([p.grad.flatten() for p in learner.model.parameters() if p.grad is not None])
    assert reported > 1e-3
    assert gradients.norm().item() == pytest.approx(1e-3, rel=1e-3)


def test_only_matrices_decay(tiny_config: RunConfig, pendulum_spec: SpaceSpec) -> None:
    learner, _ = make_learner(tiny_config, pendulum_spec)
    for group in make_optimizer(learner.model, OptimConfig(weight_decay=0.1)).param_groups:
        assert {parameter.ndim >= 2 for parameter in group["params"]} == {group["weight_decay"] == 0.1}


def test_a_policy_keeps_the_weights_it_was_made_with(tiny_config: RunConfig, pendulum_spec: SpaceSpec) -> None:
    learner, source = make_learner(tiny_config, pendulum_spec)
    policy = learner.policy()
    observations = np.zeros((2, 3), np.float32)
    policy.start(observations, np.array([-100.0, -200.0]))
    before = policy.act()
    for step in range(5):
        learner.update(source.batch(step))
    np.testing.assert_array_equal(policy.act(), before)
    assert math.isfinite(float(before.sum()))


def with_algorithm(config: RunConfig, algorithm: str) -> RunConfig:
    return replace(config, algorithm=algorithm, data=replace(config.data, validation_fraction=0.0))


@pytest.mark.parametrize("algorithm", LEARNERS)
def test_a_resumed_run_is_the_unbroken_one_whatever_is_learned(tiny_config: RunConfig, algorithm: str) -> None:
    constant = replace(tiny_config, optim=replace(tiny_config.optim, schedule="constant"))
    whole = replace(constant, algorithm=algorithm, name="whole")
    half = replace(whole, name="half", total_timesteps=10)
    summary = start_run(whole).summary
    start_run(half)
    resumed = resume_run(resumed_config(str(RunFolder.of(half)), ["total_timesteps=20"])).summary
    if declaration_of(whole).acts:
        assert resumed["last"]["targets"] == summary["last"]["targets"]
    weights = [(RunFolder.of(each).checkpoint(20) / "policy/model.safetensors").read_bytes() for each in (whole, half)]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("algorithm", ["behavior_cloning", "iql"])
def test_what_is_not_conditioned_on_returns_acts_alike_whatever_is_asked_for(
    tiny_config: RunConfig, algorithm: str
) -> None:
    first, second = start_run(replace(tiny_config, algorithm=algorithm)).summary["last"]["targets"]
    assert first["target_return"] != second["target_return"]
    np.testing.assert_allclose(first["episode_returns"], second["episode_returns"], rtol=1e-4)


def test_behavior_cloning_never_sees_a_return(tiny_config: RunConfig, pendulum_spec: SpaceSpec) -> None:
    source = ResidentSource(ResidentData.build(make_episodes([30] * 8), pendulum_spec, tiny_config), tiny_config)
    learners = [LEARNERS["behavior_cloning"](tiny_config, source.spec, source.normalizer) for _ in range(2)]
    batch = source.batch(0)
    other = replace(batch, returns_to_go=torch.randn_like(batch.returns_to_go))
    assert learners[0].update(batch)["loss"] == learners[1].update(other)["loss"]
    assert learners[0].evaluate_loss(batch)["loss"] == learners[1].evaluate_loss(other)["loss"]


def ended_episodes(lengths: list[int], *, terminated: list[bool]) -> TransitionDataset:
    data = make_episodes(lengths)
    data.terminated[data.ends - 1] = terminated
    data.truncated[data.ends - 1] = ~np.array(terminated)
    return data


@pytest.mark.parametrize("discount", [1.0, 0.9])
def test_batches_give_back_the_transitions_of_the_data(
    discount: float, tiny_config: RunConfig, pendulum_spec: SpaceSpec
) -> None:
    """Rewards, successors and how episodes end, though a batch has returns-to-go only."""
    data = ended_episodes([5, 3, 4], terminated=[False, True, False])
    config = with_algorithm(tiny_config, "iql")
    config = replace(config, data=replace(config.data, discount=discount), optim=replace(config.optim, batch_size=64))
    resident = ResidentData.build(data, pendulum_spec, config)
    source = ResidentSource(resident, config)
    places = source.train.find(np.arange(12)[None])
    found = Transitions.of(source.train.cut(places, 0), discount=discount)
    normalizer = resident.normalizer
    rewards = found.rewards.numpy() / normalizer.return_scale
    np.testing.assert_allclose(rewards, data.rewards, atol=1e-5)
    observations = normalizer.normalize_observations(data.observations)
    np.testing.assert_array_equal(found.observations.numpy(), observations)
    last = np.isin(np.arange(12), data.ends - 1)
    np.testing.assert_array_equal(found.goes_on.numpy(), ~last)
    np.testing.assert_array_equal(found.next_observations.numpy()[~last], observations[1:][~last[:-1]])
    np.testing.assert_array_equal(found.is_known.numpy(), ~last | (np.arange(12) == 7))  # the second episode's end


def test_expectiles_weigh_what_is_too_low() -> None:
    losses = expectile_loss(torch.tensor([2.0, -2.0, 0.0]), 0.9)
    torch.testing.assert_close(losses, torch.tensor([0.9 * 4, 0.1 * 4, 0.0]))
    draws = torch.linspace(0, 1, 1001)
    guess = torch.tensor(0.5, requires_grad=True)
    for _ in range(2000):
        (gradient,) = torch.autograd.grad(expectile_loss(draws - guess, 0.9).mean(), guess)
        guess = (guess - 0.5 * gradient).detach().requires_grad_()
    assert float(guess.detach()) == pytest.approx(0.75, abs=1e-3)  # of a uniform: t / (1 - t) = sqrt(0.9 / 0.1)


class FixedValues:
    """Three transitions with values by hand: V = 1, slow Q = 2, 1, 0, both Q = 1 and 3."""

    def target_action_values(self, observations: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        return torch.tensor([2.0, 1.0, 0.0])

    def values(self, observations: torch.Tensor) -> torch.Tensor:
        return torch.ones(3)

    def action_values(self, observations: torch.Tensor, actions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.ones(3), 3 * torch.ones(3)

    def log_likelihood(self, observations: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        return torch.tensor([-1.0, -2.0, -3.0])


def test_the_losses_of_implicit_q_learning_by_hand() -> None:
    nothing = torch.zeros(3, 1)
    batch = Transitions(
        observations=nothing,
        actions=nothing,
        rewards=torch.tensor([1.0, 1.0, 1.0]),
        next_observations=nothing,
        goes_on=torch.tensor([True, False, False]),
        is_known=torch.tensor([True, True, False]),  # the second was ended by the environment, the third cut
    )
    config = IQLConfig(expectile=0.9, temperature=2.0, discount=0.5)
    losses = iql_losses(FixedValues(), batch, config, reward_scale=10.0)  # type: ignore[arg-type]
    assert float(losses["value_loss"]) == pytest.approx((0.9 * 1 + 0 + 0.1 * 1) / 3)
    # Aims 10 + 0.5 * 1 and 10 + 0; errors of both critics.
    expected = ((10.5 - 1) ** 2 + (10 - 1) ** 2 + (10.5 - 3) ** 2 + (10 - 3) ** 2) / 3
    assert float(losses["critic_loss"]) == pytest.approx(expected)
    weights = [math.exp(2.0), 1.0, math.exp(-2.0)]
    assert float(losses["policy_loss"]) == pytest.approx((weights[0] * 1 + weights[1] * 2 + weights[2] * 3) / 3)
    parts = losses["value_loss"] + losses["critic_loss"] + losses["policy_loss"]
    torch.testing.assert_close(losses["loss"], parts)


def test_each_loss_of_implicit_q_learning_moves_its_own_networks(
    tiny_config: RunConfig, pendulum_spec: SpaceSpec
) -> None:
    config = with_algorithm(tiny_config, "iql")
    source = ResidentSource(ResidentData.build(make_episodes([30] * 8), pendulum_spec, config), config)
    learner = IQLLearner(config, source.spec, source.normalizer)
    own = {"value_loss": "value.", "critic_loss": "critics.", "policy_loss": ("mean.", "log_std")}
    for loss, prefix in own.items():
        learner.model.zero_grad()
        learner.loss(source.batch(0))[loss].backward()
        moved = {name for name, p in learner.model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
        assert moved
        assert all(name.startswith(prefix) for name in moved)


def test_slow_critics_follow(tiny_config: RunConfig, pendulum_spec: SpaceSpec) -> None:
    config = with_algorithm(tiny_config, "iql")
    source = ResidentSource(ResidentData.build(make_episodes([30] * 8), pendulum_spec, config), config)
    learner = IQLLearner(config, source.spec, source.normalizer)
    slow = [p.clone() for p in learner.model.target_critics.parameters()]
    learner.update(source.batch(0))
    for before, after, fast in zip(
        slow, learner.model.target_critics.parameters(), learner.model.critics.parameters(), strict=True
    ):
        torch.testing.assert_close(after, before + config.iql.target_update * (fast - before))


COMPILED = {"compile": True}
COMPILED_BFLOAT16 = {"compile": True, "precision": "bfloat16"}


@pytest.mark.parametrize(
    ("algorithm", "settings", "tolerance"),
    [
        ("decision_transformer", {"precision": "bfloat16"}, 2e-2),
        ("iql", {"precision": "bfloat16"}, 2e-2),
        pytest.param("decision_transformer", COMPILED, 1e-4, marks=pytest.mark.nightly),
        pytest.param("iql", COMPILED, 1e-4, marks=pytest.mark.nightly),
        pytest.param("decision_transformer", COMPILED_BFLOAT16, 2e-2, marks=pytest.mark.slow),
        pytest.param("iql", COMPILED_BFLOAT16, 2e-2, marks=pytest.mark.nightly),
    ],
)
def test_accelerated_updates_are_the_plain_ones(
    tiny_config: RunConfig, pendulum_spec: SpaceSpec, algorithm: str, settings: dict, tolerance: float
) -> None:
    plain = with_algorithm(tiny_config, algorithm)
    plain = replace(plain, model=replace(plain.model, dropout=0.0))
    source = ResidentSource(ResidentData.build(make_episodes([30] * 8), pendulum_spec, plain), plain)
    losses = []
    for config in (plain, replace(plain, optim=replace(plain.optim, **settings))):
        learner = learner_class(algorithm)(config, source.spec, source.normalizer)
        losses.append([float(learner.update(source.batch(step))["loss"]) for step in range(10)])
        assert {parameter.dtype for parameter in learner.model.parameters()} == {torch.float32}
    np.testing.assert_allclose(losses[1], losses[0], rtol=tolerance)
    if settings.get("precision") == "bfloat16":
        assert losses[1] != losses[0]


def test_compiling_without_a_compiler_is_refused(
    tiny_config: RunConfig, pendulum_spec: SpaceSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    config = replace(tiny_config, optim=replace(tiny_config.optim, compile=True))
    source = ResidentSource(ResidentData.build(make_episodes([30] * 8), pendulum_spec, config), config)
    with pytest.raises(ResourceError, match="needs a C\\+\\+ compiler and there is no no-such-compiler"):
        learner_class("decision_transformer")(config, source.spec, source.normalizer)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_memory_is_used_again_without_page_faults() -> None:
    """In a process of its own, whose heap nobody else has grown."""
    script = """
import resource, torch
from dt_ray.learners.acceleration import keep_memory
keep_memory()
def update():
    activations = [torch.ones(1 << 20) for _ in range(20)]
for _ in range(3):
    update()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    update()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 100  # of 200,000 pages


def test_objects_are_of_their_algorithm(tiny_config: RunConfig) -> None:
    run = start_run(replace(tiny_config, algorithm="iql")).run
    assert IQL.load(run).learner.step == 20
    with pytest.raises(ConfigError, match="DecisionTransformer trains algorithm=decision_transformer, got iql"):
        DecisionTransformer.load(run)
    model = BehaviorCloning(total_timesteps=7, model={"width": 32, "num_heads": 2})
    assert (model.config.total_timesteps, model.config.model.width, model.config.data.top_fraction) == (7, 32, 0.1)
    with pytest.raises(ConfigError, match="did you mean model.width"):
        BehaviorCloning(model={"widht": 32})

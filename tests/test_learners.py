import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import make_episodes

from dt_ray.config import OptimConfig, RunConfig
from dt_ray.data.spaces import SpaceSpec
from dt_ray.learners.decision_transformer import DecisionTransformerLearner, learning_rate_at, make_optimizer
from dt_ray.sources import ResidentData, ResidentSource


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

"""What the bits of a computation, and the shares of a batch, must not change."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from support.examples import make_episodes
from torch import Tensor

from dt_ray.config.schema import ModelConfig, OptimConfig, PerceptronConfig, RunConfig
from dt_ray.data.spaces import SpaceSpec
from dt_ray.jobs.training import start_run
from dt_ray.learners import learner_class
from dt_ray.learners.acceleration import products_of
from dt_ray.losses import iql_losses
from dt_ray.models.actor_critic import ActorCriticModel, Transitions
from dt_ray.models.precision import full_float32
from dt_ray.models.state_values import StateValues
from dt_ray.training.resident import ResidentData, ResidentSource


def far_from_zero(network: torch.nn.Sequential, value: float = -60.0) -> None:
    last = network[-1]
    assert isinstance(last, torch.nn.Linear)
    with torch.no_grad():
        last.bias.fill_(value)
        last.weight.mul_(0.1)


def transitions(num: int, spec: SpaceSpec) -> Transitions:
    generator = torch.Generator().manual_seed(1)
    return Transitions(
        observations=torch.randn(num, spec.observation_dim, generator=generator),
        actions=torch.rand(num, spec.action_dim, generator=generator) * 2 - 1,
        rewards=torch.randn(num, generator=generator),
        next_observations=torch.randn(num, spec.observation_dim, generator=generator),
        goes_on=torch.ones(num, dtype=torch.bool),
        is_known=torch.ones(num, dtype=torch.bool),
    )


def test_values_and_advantages_are_float32s_under_autocast(tiny_config: RunConfig, pendulum_spec: SpaceSpec) -> None:
    torch.manual_seed(0)
    model = ActorCriticModel(ModelConfig(num_layers=2, width=32, num_heads=1), pendulum_spec)
    for network in (model.value, *model.critics, *model.target_critics):
        far_from_zero(network)
    batch = transitions(64, pendulum_spec)
    plain = iql_losses(model, batch, tiny_config.iql, reward_scale=1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lower = iql_losses(model, batch, tiny_config.iql, reward_scale=1.0)
        values = model.values(batch.observations)
        advantages = model.target_action_values(batch.observations, batch.actions) - values
    assert values.dtype == advantages.dtype == torch.float32
    torch.testing.assert_close(values, model.values(batch.observations), rtol=0, atol=0)
    assert len(advantages.unique()) == 64
    for name in ("value_loss", "critic_loss", "value", "advantage"):
        assert float(lower[name].detach()) == float(plain[name].detach()), name
    assert float(lower["policy_loss"].detach()) == pytest.approx(float(plain["policy_loss"].detach()), rel=0.02)


def test_what_is_asked_for_above_a_value_is_a_float32_under_autocast() -> None:
    values = StateValues(3, PerceptronConfig(num_layers=2, width=16))
    far_from_zero(values.network)
    values.bounds.copy_(torch.tensor([-10.0, 10.0]))
    observations, to_go = torch.randn(4, 5, 3), torch.full((4, 5), -59.9)
    plain = values.relative(to_go, observations)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lower = values.relative(to_go, observations)
    torch.testing.assert_close(lower, plain, rtol=0, atol=0)


@pytest.fixture
def own_setting() -> str:
    return torch.get_float32_matmul_precision()


@pytest.mark.parametrize("algorithm", ["decision_transformer", "iql"])
def test_a_run_under_tf32_leaves_nothing_to_the_next(tiny_config: RunConfig, own_setting: str, algorithm: str) -> None:
    seen: list[str] = []

    def note(module: torch.nn.Module, *arguments: object) -> None:
        seen.append(torch.get_float32_matmul_precision())

    config = replace(tiny_config, algorithm=algorithm, total_timesteps=2)
    hook = torch.nn.modules.module.register_module_full_backward_hook(note)
    try:
        start_run(replace(config, name="tf32", optim=replace(config.optim, precision="tf32")))
        assert set(seen) == {"high"}
        assert torch.get_float32_matmul_precision() == own_setting
        seen.clear()
        start_run(replace(config, name="float32"))
        assert set(seen) == {"highest"}
    finally:
        hook.remove()


def test_values_are_exact_under_tf32_too() -> None:
    with products_of(OptimConfig(precision="tf32")):
        assert torch.get_float32_matmul_precision() == "high"
        with full_float32(torch.device("cpu")):
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "high"


@pytest.mark.parametrize("algorithm", ["iql", "decision_transformer", "behavior_cloning"])
@pytest.mark.parametrize("world_size", [1, 3, 5, 8])
def test_shares_of_any_size_have_the_gradient_of_the_whole_batch(
    tiny_config: RunConfig, pendulum_spec: SpaceSpec, algorithm: str, world_size: int
) -> None:
    """A batch of 8 among 3 workers is 2, 3 and 3 windows: the mean of their gradients is that of all 8."""
    config = replace(tiny_config, algorithm=algorithm)
    config = replace(
        config, model=replace(config.model, dropout=0.0), optim=replace(config.optim, batch_size=8, gradient_clip=None)
    )
    data = ResidentData.build(make_episodes([9, 2, 3, 17, 30, 5]), pendulum_spec, config)

    def gradients_of(num_workers: int) -> tuple[dict[str, Tensor], float]:
        sums: dict[str, Tensor] = {}
        loss = 0.0
        for rank in range(num_workers):
            source = ResidentSource(data, config, rank=rank, world_size=num_workers)
            batch = source.batch(3)
            learner = learner_class(algorithm)(config, source.spec, source.normalizer)
            learner.steps.optimizer.step = lambda: None  # type: ignore[attr-defined]
            mean_real = None if num_workers == 1 else batch.num_real / num_workers  # type: ignore[operator]
            loss += float(learner.update(batch, num_real=mean_real)["loss"]) / num_workers
            for name, parameter in learner.model.named_parameters():
                if parameter.grad is not None:
                    sums[name] = sums.get(name, torch.zeros(())) + parameter.grad / num_workers
        return sums, loss

    whole, whole_loss = gradients_of(1)
    shared, shared_loss = gradients_of(world_size)
    assert shared_loss == pytest.approx(whole_loss, rel=1e-5)
    assert set(whole) == set(shared)
    for name, gradient in whole.items():
        np.testing.assert_allclose(shared[name], gradient, rtol=1e-4, atol=1e-6, err_msg=name)

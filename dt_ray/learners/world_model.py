"""Learns a world model from a log: one-step models, ends, and quantiles of returns-to-go."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed
from jaxtyping import Float
from torch import Tensor, nn

from dt_ray.config.derived import Derived, LogOutline
from dt_ray.config.schema import RunConfig
from dt_ray.data.normalizer import Normalizer
from dt_ray.data.spaces import SpaceSpec
from dt_ray.errors import UserError
from dt_ray.learners.acceleration import accelerate, products_of
from dt_ray.learners.base import Declaration, GradientSteps, Policy
from dt_ray.losses import Metrics, world_model_losses
from dt_ray.models.actor_critic import Transitions
from dt_ray.models.batch import WindowBatch
from dt_ray.models.world_model import WorldModel

SMALL_DIMS = 8  # of observation and action together; a log with no more trains the small networks
SMALL_SIZE = {"model.num_layers": 2, "model.width": 128, "total_timesteps": 5000}
SIZE = {"model.num_layers": 3, "model.width": 256, "total_timesteps": 12_000}
NUM_PASSES, MEMBER_BATCH, FEWEST_UPDATES = 50, 256, 500


def sizes_for(log: LogOutline) -> list[Derived]:
    """The size of the networks and of their training for a log."""
    dims = log.observation_dim + len(log.action_low)
    found = SMALL_SIZE if dims <= SMALL_DIMS else SIZE
    passes = max(FEWEST_UPDATES, NUM_PASSES * log.num_steps // MEMBER_BATCH)
    why = f"{dims} dimensions of observation and action: up to {SMALL_DIMS}, or more"
    most = found["total_timesteps"]
    length = f"{NUM_PASSES} passes of each member over the log, at most {most}"
    return [
        *(Derived(key=key, value=value, why=why) for key, value in found.items() if key != "total_timesteps"),
        Derived(key="total_timesteps", value=min(most, passes), why=length),
    ]


class WorldModelLearner:
    """Gradient steps on all networks together, whose losses share no parameter."""

    declares = Declaration(
        window_length=2,  # a step and the one after it
        returns="rewards",
        sections=("world_model",),
        acts=False,
        sizes=sizes_for,
    )

    def __init__(
        self,
        config: RunConfig,
        spec: SpaceSpec,
        normalizer: Normalizer,
        *,
        device: torch.device | str = "cpu",
        data_parallel: Callable[[nn.Module], nn.Module] = lambda module: module,
        rank: int = 0,
    ) -> None:
        self.config, self.spec, self.normalizer = config, spec, normalizer
        torch.manual_seed(config.seed)  # pyright: ignore[reportUnknownMemberType]
        self.model = WorldModel(spec.observation_dim, spec.action_dim, config.model, config.world_model).to(device)
        self.loss = accelerate(data_parallel(WorldModelLoss(self.model, config.data.discount)), config.optim, device)
        self.steps = GradientSteps(self.model, config)

    @property
    def step(self) -> int:
        return self.steps.number

    def update(self, batch: WindowBatch, *, num_real: Float[Tensor, ""] | None = None) -> Metrics:
        if self.step == 0:
            fit_units(self.model, Transitions.of(batch, discount=self.config.data.discount))
        with products_of(self.config.optim):
            losses = self.loss(batch)
            taken = self.steps.take(losses["loss"])
        return {name: value.detach() for name, value in losses.items()} | taken

    @torch.no_grad()
    def evaluate_loss(self, batch: WindowBatch, *, num_real: Float[Tensor, ""] | None = None) -> Metrics:
        with products_of(self.config.optim):
            return self.loss(batch)

    def policy(self) -> Policy:
        """Raises:
        UserError: always; a world model does not act.
        """
        raise UserError("a world model does not act; give the run of a policy")

    def state_dict(self) -> dict[str, Any]:
        return self.steps.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps.load_state_dict(state)


class WorldModelLoss(nn.Module):
    """All losses of a batch in one module, whose gradients a data-parallel wrapper averages."""

    def __init__(self, model: WorldModel, discount: float) -> None:
        super().__init__()
        self.model, self.discount = model, discount

    def forward(self, batch: WindowBatch) -> Metrics:
        return world_model_losses(self.model, batch, Transitions.of(batch, discount=self.discount))


@torch.no_grad()
def fit_units(model: WorldModel, steps: Transitions) -> None:
    """Sets the units of the predictions from the first batch of all workers together."""
    changes = (steps.next_observations - steps.observations)[steps.goes_on]
    ones = torch.ones_like(steps.rewards)
    sums = [*changes.double().square().sum(dim=0), changes.new_tensor(len(changes))]
    sums += [part.double().sum() for part in (ones, steps.rewards, steps.rewards.double().square())]
    totals = torch.stack([each.double() for each in sums])
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(totals)  # pyright: ignore[reportUnknownMemberType]
    squares, (num_changes, num, rewards, squared) = totals[:-4], totals[-4:].unbind()
    model.change_std.copy_((squares / num_changes.clamp(min=1)).sqrt().clamp(min=1e-4))
    model.reward_mean.copy_(rewards / num)
    model.reward_std.copy_((squared / num - (rewards / num).square()).clamp(min=0).sqrt().clamp(min=1e-6))

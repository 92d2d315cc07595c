"""Implicit Q-learning (Kostrikov et al. 2021): values by expectile regression, a policy by weighted regression."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed
from jaxtyping import Float, Int
from numpy import ndarray
from torch import Tensor, nn

from dt_ray.config.schema import IQLConfig, PerceptronConfig, RunConfig
from dt_ray.data.normalizer import Normalizer
from dt_ray.data.spaces import SpaceSpec
from dt_ray.learners.acceleration import accelerate, products_of
from dt_ray.learners.base import Declaration, GradientSteps, ValueFunction
from dt_ray.losses import Metrics, iql_losses
from dt_ray.models.actor_critic import ActorCriticModel, Transitions
from dt_ray.models.batch import WindowBatch


class IQLLearner:
    """Gradient steps on the values and the policy together, whose losses share no parameter."""

    declares = Declaration(
        window_length=2,  # a step and the one after it
        returns="rewards",
        sections=("iql",),
        needs_next_steps=True,
        gives_values=True,
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
        self.model = ActorCriticModel(config.model, spec).to(device)
        # Values in rewards of the data's own units, times reward_scale: the temperature is relative to them.
        self.reward_scale = config.iql.reward_scale / normalizer.return_scale
        loss = IQLLoss(self.model, config.iql, discount=config.data.discount, reward_scale=self.reward_scale)
        self.loss = accelerate(data_parallel(loss), config.optim, device)
        self.steps = GradientSteps(self.model, config)

    @property
    def step(self) -> int:
        return self.steps.number

    def update(self, batch: WindowBatch, *, num_real: Float[Tensor, ""] | None = None) -> Metrics:
        config = self.config
        with products_of(config.optim):
            losses = self.loss(batch, mean_windows(batch, num_real, config.optim.batch_size))
            taken = self.steps.take(losses["loss"])
        self.model.follow(config.iql.target_update)
        return {name: value.detach() for name, value in losses.items()} | taken

    @torch.no_grad()
    def evaluate_loss(self, batch: WindowBatch, *, num_real: Float[Tensor, ""] | None = None) -> Metrics:
        with products_of(self.config.optim):
            return self.loss(batch, mean_windows(batch, num_real, self.config.optim.batch_size))

    def policy(self) -> ObservationPolicy:
        return ObservationPolicy(copy.deepcopy(self.model).cpu(), self.normalizer)

    def value_function(self) -> ValueFunction:
        """The learned value of states."""
        sizes = PerceptronConfig(num_layers=self.config.model.num_layers, width=self.config.model.width)
        return ValueFunction(self.model.value, sizes, self.config.iql.reward_scale)

    def state_dict(self) -> dict[str, Any]:
        return self.steps.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps.load_state_dict(state)


class IQLLoss(nn.Module):
    """All losses of a batch in one module, whose gradients a data-parallel wrapper averages."""

    def __init__(self, model: ActorCriticModel, config: IQLConfig, *, discount: float, reward_scale: float) -> None:
        super().__init__()
        self.model, self.config = model, config
        self.discount, self.reward_scale = discount, reward_scale

    def forward(self, batch: WindowBatch, mean_windows: float | Tensor | None = None) -> Metrics:
        transitions = Transitions.of(batch, discount=self.discount)
        return iql_losses(
            self.model, transitions, self.config, reward_scale=self.reward_scale, mean_windows=mean_windows
        )


def mean_windows(batch: WindowBatch, num_real: Float[Tensor, ""] | None, batch_size: int) -> float | Tensor:
    """The mean number of windows of a worker; `num_real` is the mean number of real steps where there are several."""
    if num_real is None:
        return len(batch.mask)
    if batch.num_real is not None:  # what all of them have together
        return batch_size * num_real / batch.num_real
    return batch_size / (torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1)


class ObservationPolicy:
    """Acts on the newest observation alone and ignores the target return."""

    history_length = 1  # steps of an episode that an action depends on
    return_scale = 0.0

    def __init__(self, model: ActorCriticModel, normalizer: Normalizer) -> None:
        self.model, self.normalizer = model.eval(), normalizer

    def start(self, observations: Float[ndarray, "N S"], target_returns: Float[ndarray, "N"]) -> None:
        self._observations = observations

    @torch.inference_mode()
    def act(self) -> Float[ndarray, "N A"]:
        observations = torch.as_tensor(self.normalizer.normalize_observations(self._observations))
        return self.normalizer.denormalize_actions(self.model.policy_mean(observations).numpy())

    def observe(
        self, actions: Float[ndarray, "N A"], rewards: Float[ndarray, "N"], observations: Float[ndarray, "N S"]
    ) -> None:
        self._observations = observations

    def keep(self, episodes: Sequence[int] | Int[ndarray, "M"]) -> None:
        self._observations = self._observations[np.asarray(episodes)]

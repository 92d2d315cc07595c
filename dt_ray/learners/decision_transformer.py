"""Supervised learning of actions, conditioned on returns-to-go (Chen et al. 2021, algorithm 1)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dt_ray.config.schema import RunConfig
from dt_ray.data.normalizer import Normalizer
from dt_ray.data.spaces import SpaceSpec
from dt_ray.learners.acceleration import accelerate, products_of
from dt_ray.learners.base import Declaration, GradientSteps
from dt_ray.learners.policies import DecisionTransformerPolicy
from dt_ray.losses import Metrics, ceiling_loss, decision_transformer_loss
from dt_ray.models.batch import WindowBatch
from dt_ray.models.decision_transformer import DecisionTransformerModel


class DecisionTransformerLearner:
    """Gradient steps on the masked action error."""

    declares = Declaration(counts_from_values=True)
    is_conditioned = True  # on returns-to-go

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
        self.config, self.spec, self.normalizer, self.rank = config, spec, normalizer, rank
        torch.manual_seed(config.seed)  # pyright: ignore[reportUnknownMemberType]
        self.model = DecisionTransformerModel(config.model, spec).to(device)
        self.forward = accelerate(data_parallel(self.model), config.optim, device)
        self.steps = GradientSteps(self.model, config)

    @property
    def step(self) -> int:
        return self.steps.number

    def update(self, batch: WindowBatch, *, num_real: Float[Tensor, ""] | None = None) -> Metrics:
        config, batch = self.config, self._seen(batch)
        # Dropout is a function of (seed, step, rank): a resumed run draws what an unbroken one would have drawn.
        torch.manual_seed(hash((config.seed, self.step, self.rank)))  # pyright: ignore[reportUnknownMemberType]
        self.model.train()
        with products_of(config.optim):
            loss, metrics = self._loss(self.forward(batch), batch, num_real)
            return metrics | self.steps.take(loss)

    @torch.no_grad()
    def evaluate_loss(self, batch: WindowBatch, *, num_real: Float[Tensor, ""] | None = None) -> Metrics:
        self.model.eval()
        batch = self._seen(batch)
        with products_of(self.config.optim):
            return self._loss(self.model(batch), batch, num_real)[1]

    def _loss(
        self,
        predicted: tuple[Float[Tensor, "B T A"], Float[Tensor, "B T"] | None],
        batch: WindowBatch,
        num_real: Float[Tensor, ""] | None,
    ) -> tuple[Float[Tensor, ""], Metrics]:
        """The loss whose gradient is taken, and the metrics: `loss` among them is that of the actions alone."""
        actions, ceilings = predicted
        loss, metrics = decision_transformer_loss(actions, batch, num_real=num_real)
        if ceilings is None:
            return loss, metrics
        of_ceilings = ceiling_loss(ceilings, batch, num_real=num_real)
        return loss + of_ceilings, metrics | {"ceiling_loss": of_ceilings.detach()}

    def policy(self) -> DecisionTransformerPolicy:
        model = copy.deepcopy(self.model).cpu()
        return DecisionTransformerPolicy(
            model,
            self.normalizer,
            context_length=self.config.evaluation.context_length,
            is_conditioned=self.is_conditioned,
        )

    def _seen(self, batch: WindowBatch) -> WindowBatch:
        if self.is_conditioned:
            return batch
        return replace(batch, returns_to_go=torch.zeros_like(batch.returns_to_go))

    def state_dict(self) -> dict[str, Any]:
        return self.steps.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps.load_state_dict(state)


class BehaviorCloningLearner(DecisionTransformerLearner):
    """The same transformer, which never sees a return."""

    declares = Declaration(returns="ignored")
    is_conditioned = False

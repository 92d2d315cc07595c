"""Supervised learning of actions, conditioned on returns-to-go (Chen et al. 2021, algorithm 1)."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dt_ray.config.schema import OptimConfig, RunConfig
from dt_ray.data.normalizer import Normalizer
from dt_ray.data.spaces import SpaceSpec
from dt_ray.learners.acceleration import accelerate, products_of
from dt_ray.learners.policies import DecisionTransformerPolicy
from dt_ray.losses import Metrics, decision_transformer_loss
from dt_ray.models.batch import WindowBatch
from dt_ray.models.decision_transformer import DecisionTransformerModel


class DecisionTransformerLearner:
    """AdamW on the masked action error, with warm-up, decay and gradient clipping.

    Without `is_conditioned` the model never sees a return: behaviour cloning by the same transformer.
    """

    def __init__(
        self,
        config: RunConfig,
        spec: SpaceSpec,
        normalizer: Normalizer,
        *,
        device: torch.device | str = "cpu",
        data_parallel: Callable[[nn.Module], nn.Module] = lambda module: module,
        rank: int = 0,
        is_conditioned: bool = True,
    ) -> None:
        self.is_conditioned = is_conditioned
        self.config, self.spec, self.normalizer, self.rank = config, spec, normalizer, rank
        self.step = 0
        torch.manual_seed(config.seed)
        self.model = DecisionTransformerModel(config.model, spec).to(device)
        self.forward = accelerate(data_parallel(self.model), config.optim, device)
        self.optimizer = make_optimizer(self.model, config.optim)

    def update(self, batch: WindowBatch, *, num_real: Float[Tensor, ""] | None = None) -> Metrics:
        config, batch = self.config, self._seen(batch)
        # Dropout is a function of (seed, step, rank): a resumed run draws what an unbroken one would have drawn.
        torch.manual_seed(hash((config.seed, self.step, self.rank)))
        learning_rate = learning_rate_at(self.step, config.optim, total=config.total_timesteps)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.model.train()
        with products_of(config.optim):
            loss, metrics = decision_transformer_loss(self.forward(batch), batch, num_real=num_real)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
        limit = math.inf if config.optim.gradient_clip is None else config.optim.gradient_clip
        metrics["gradient_norm"] = nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        self.optimizer.step()
        self.step += 1
        return metrics | {"learning_rate": torch.tensor(learning_rate)}

    @torch.no_grad()
    def evaluate_loss(self, batch: WindowBatch, *, num_real: Float[Tensor, ""] | None = None) -> Metrics:
        self.model.eval()
        batch = self._seen(batch)
        with products_of(self.config.optim):
            return decision_transformer_loss(self.model(batch), batch, num_real=num_real)[1]

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
        return {"step": self.step, "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        self.optimizer.load_state_dict(state["optimizer"])


def make_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices, not on biases and norms."""
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.95), fused=True)


def learning_rate_at(step: int, config: OptimConfig, *, total: int) -> float:
    """Linear warm-up to `learning_rate`, then constant, or half a cosine that reaches 0 after update `total`."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    progress = (step - config.warmup_steps) / max(1, total - config.warmup_steps)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

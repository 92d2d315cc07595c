"""Values and a policy of single transitions, for implicit Q-learning.

Legend: B transitions, S observation, A action dimension, D width.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from dt_ray.config.schema import ModelConfig
from dt_ray.data.spaces import SpaceSpec
from dt_ray.models.batch import WindowBatch
from dt_ray.models.decision_transformer import last_step
from dt_ray.models.perceptron import make_perceptron
from dt_ray.models.precision import full_float32

LOG_STD_RANGE = (-5.0, 2.0)


@dataclass(frozen=True, kw_only=True)
class Transitions:
    """The first step of each window and the one after it, in the model's units."""

    observations: Float[Tensor, "B S"]
    actions: Float[Tensor, "B A"]
    rewards: Float[Tensor, "B"]
    next_observations: Float[Tensor, "B S"]
    goes_on: Bool[Tensor, "B"]  # the next observation is known and not terminal
    is_known: Bool[Tensor, "B"]  # `goes_on`, or the environment ended the episode; else what came next is unknown

    @classmethod
    def of(cls, windows: WindowBatch, *, discount: float) -> Transitions:
        """Rewards are the differences of the returns-to-go, which were summed with `discount`.

        Windows that don't say how their episodes ended were all cut by a time limit.
        """
        inside = windows.mask[:, 1]
        terminated = torch.zeros_like(inside) if windows.terminated is None else windows.terminated
        goes_on = inside if windows.followed is None else inside | windows.followed
        to_go = windows.returns_to_go
        return cls(
            observations=windows.observations[:, 0],
            actions=windows.actions[:, 0],
            rewards=to_go[:, 0] - discount * to_go[:, 1] * inside,
            next_observations=windows.observations[:, 1],
            goes_on=goes_on,
            is_known=goes_on | terminated,
        )


class ActorCriticModel(nn.Module):
    """V(s), two Q(s, a) with slowly following copies, and a Gaussian policy, each a perceptron of its own.

    Values are computed in full float32 under any `optim.precision`: a policy is weighted with an exponential of their
    differences. The policy is computed as `optim.precision` says.
    """

    def __init__(self, config: ModelConfig, spec: SpaceSpec) -> None:
        super().__init__()
        observation_dim, action_dim = spec.observation_dim, spec.action_dim
        both = observation_dim + action_dim
        self.value = make_perceptron(observation_dim, 1, config)
        self.critics = nn.ModuleList([make_perceptron(both, 1, config) for _ in range(2)])
        self.target_critics = copy.deepcopy(self.critics).requires_grad_(False)
        self.mean = make_perceptron(observation_dim, action_dim, config)
        self.log_std = nn.Parameter(torch.zeros(action_dim))

    def values(self, observations: Float[Tensor, "B S"]) -> Float[Tensor, "B"]:
        with full_float32(observations.device):
            return self.value(observations.float())[:, 0]

    def action_values(
        self, observations: Float[Tensor, "B S"], actions: Float[Tensor, "B A"]
    ) -> tuple[Float[Tensor, "B"], Float[Tensor, "B"]]:
        """Both critics' values."""
        one, other = _of_each(self.critics, observations, actions)
        return one, other

    def target_action_values(
        self, observations: Float[Tensor, "B S"], actions: Float[Tensor, "B A"]
    ) -> Float[Tensor, "B"]:
        """The lower of the slow critics' values (Fujimoto et al. 2018)."""
        return torch.minimum(*_of_each(self.target_critics, observations, actions))

    def policy_mean(self, observations: Float[Tensor, "B S"]) -> Float[Tensor, "B A"]:
        """The most likely actions, in [-1, 1]."""
        return torch.tanh(self.mean(observations))

    def log_likelihood(self, observations: Float[Tensor, "B S"], actions: Float[Tensor, "B A"]) -> Float[Tensor, "B"]:
        """Of the logged actions, under a Gaussian whose spread does not depend on the observation."""
        std = self.log_std.clamp(*LOG_STD_RANGE).exp()
        return torch.distributions.Normal(self.policy_mean(observations).float(), std).log_prob(actions).sum(dim=-1)

    @torch.no_grad()
    def follow(self, rate: float) -> None:
        """Moves the slow critics towards the others."""
        for slow, fast in zip(self.target_critics.parameters(), self.critics.parameters(), strict=True):
            slow.lerp_(fast, rate)

    def predict_last_action(self, windows: WindowBatch) -> Float[Tensor, "B A"]:
        """The action at the last real step of each window; the other steps are not used."""
        return self.policy_mean(last_step(windows.observations, windows.mask))


def _of_each(
    critics: nn.ModuleList, observations: Float[Tensor, "B S"], actions: Float[Tensor, "B A"]
) -> list[Float[Tensor, "B"]]:
    with full_float32(observations.device):
        both = torch.cat([observations, actions], dim=-1).float()
        return [critic(both)[:, 0] for critic in critics]

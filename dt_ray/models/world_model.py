"""A world model: what a log says about the next observation, the reward, the end and the returns from a state.

Legend: M members, B transitions of each member, S observation, A action dimension, Q quantiles.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dt_ray.config.schema import ModelConfig, PerceptronConfig, WorldModelConfig
from dt_ray.models.perceptron import make_perceptron

QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)  # of the returns-to-go that the log has at a state
RETURNS_NETWORK = PerceptronConfig(num_layers=2, width=64)
END_WIDTH = 64
STD_RANGE = (1e-3, 2.0)  # of a prediction, in standard deviations of what is predicted


class Prediction(NamedTuple):
    """Normal distributions of each member, for one step."""

    changes: Float[Tensor, "M B S"]  # of the observation, in the model's units
    rewards: Float[Tensor, "M B"]
    log_stds: Float[Tensor, "M B S+1"]  # of changes and rewards, relative to `change_std` and `reward_std`


class EnsembleLinear(nn.Module):
    """One linear layer for each member, computed as one batched product."""

    def __init__(self, members: int, inputs: int, outputs: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(inputs)
        self.weight = nn.Parameter(torch.empty(members, inputs, outputs).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(members, 1, outputs).uniform_(-bound, bound))

    def forward(self, values: Float[Tensor, "M B I"]) -> Float[Tensor, "M B O"]:
        return torch.baddbmm(self.bias, values, self.weight)


class WorldModel(nn.Module):
    """An ensemble of one-step models (Chua et al. 2018), and quantiles of the logged returns-to-go.

    The end of an episode is predicted from the observation after a step. All networks are in the units of the
    normalizer: observations standardised, actions in [-1, 1], rewards and returns times `return_scale`.
    """

    def __init__(self, observation_dim: int, action_dim: int, config: ModelConfig, settings: WorldModelConfig) -> None:
        super().__init__()
        members = self.num_members = settings.num_members
        self.observation_dim, self.max_timesteps = observation_dim, config.max_timesteps
        sizes = [observation_dim + action_dim, *[config.width] * config.num_layers, 2 * (observation_dim + 1)]
        self.step = make_ensemble(members, sizes)
        self.end = make_ensemble(members, [observation_dim, END_WIDTH, END_WIDTH, 1])
        self.returns = make_perceptron(observation_dim + 1, len(QUANTILES), RETURNS_NETWORK)
        self.register_buffer("change_std", torch.ones(observation_dim))
        self.register_buffer("reward_mean", torch.zeros(()))
        self.register_buffer("reward_std", torch.ones(()))
        self.change_std: Tensor
        self.reward_mean: Tensor
        self.reward_std: Tensor

    def forward(self, observations: Float[Tensor, "M B S"], actions: Float[Tensor, "M B A"]) -> Prediction:
        out = self.step(torch.cat([observations, actions], dim=-1))
        means, log_stds = out.chunk(2, dim=-1)
        low, high = map(math.log, STD_RANGE)
        log_stds = low + (high - low) * torch.sigmoid(log_stds)
        changes = means[..., :-1] * self.change_std
        rewards = self.reward_mean + means[..., -1] * self.reward_std
        return Prediction(changes, rewards, log_stds)

    def end_logits(self, next_observations: Float[Tensor, "M B S"]) -> Float[Tensor, "M B"]:
        """Of the episode's end by the environment, given the observation after a step."""
        return self.end(next_observations)[..., 0]

    def return_quantiles(self, observations: Float[Tensor, "B S"], timesteps: Int[Tensor, "B"]) -> Float[Tensor, "B Q"]:
        """`QUANTILES` of the returns-to-go that the log has at a state, in increasing order."""
        progress = (timesteps / self.max_timesteps).clamp(max=1.0)[..., None]
        return self.returns(torch.cat([observations, progress], dim=-1))


def make_ensemble(members: int, sizes: list[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in zip(sizes, sizes[1:], strict=False):
        layers += [EnsembleLinear(members, inputs, outputs), nn.SiLU()]
    return nn.Sequential(*layers[:-1])

"""Learns the highest return-to-go that each state allows. The model tells its action head the distance below it.

Legend: B windows, T window length, S observation.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dt_ray.config.schema import PerceptronConfig
from dt_ray.models.perceptron import make_perceptron
from dt_ray.models.precision import full_float32

QUANTILE = 0.98  # of the returns-to-go that the data has at a state
NETWORK = PerceptronConfig(num_layers=2, width=64)


class ReturnCeiling(nn.Module):
    """A high quantile of the logged returns-to-go, given observation and timestep, in the model's units.

    It is learned beside the actions, by quantile regression (Koenker and Bassett 1978). Like the return that Reinformer
    (Zhuang et al. 2024) predicts, it tells what is in reach; a wish beyond it means as much as can be had.
    """

    def __init__(self, observation_dim: int, max_timesteps: int) -> None:
        super().__init__()
        self.max_timesteps = max_timesteps
        self.network = make_perceptron(observation_dim + 1, 1, NETWORK)

    def forward(self, observations: Float[Tensor, "B T S"], timesteps: Int[Tensor, "B T"]) -> Float[Tensor, "B T"]:
        progress = (timesteps / self.max_timesteps).clamp(max=1.0)[..., None]
        with full_float32(observations.device):
            return self.network(torch.cat([observations.float(), progress], dim=-1))[..., 0]


def below(returns_to_go: Float[Tensor, "B T"], ceilings: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """How far what is asked for lies below the most that can be had: 0 for more than that."""
    return torch.clamp(returns_to_go.float() - ceilings.detach(), max=0.0)

"""Learned state values inside a model, which sees returns-to-go relative to them.

Legend: B windows, T window length, S observation.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dt_ray.config.schema import PerceptronConfig
from dt_ray.models.perceptron import make_perceptron
from dt_ray.models.precision import full_float32


class StateValues(nn.Module):
    """V(s) by a network that was learned before and stays as it is, in the units of the model around it.

    A return-to-go becomes what is asked for above the state's value, within `bounds`, which data has shown: more than
    can be had means as much as can be had. So values correct a target at every step (as Zhuang et al. 2024 do with the
    return that their model predicts), and the transformer sees advantages (Gao et al. 2023).
    """

    bounds: Float[Tensor, "2"]

    def __init__(self, observation_dim: int, config: PerceptronConfig) -> None:
        super().__init__()
        self.config = config
        self.network = make_perceptron(observation_dim, 1, config)
        self.register_buffer("bounds", torch.zeros(2))
        self.requires_grad_(False)

    def forward(self, observations: Float[Tensor, "*any S"]) -> Float[Tensor, "*any"]:
        with full_float32(observations.device):
            return self.network(observations.float())[..., 0]

    def relative(
        self, returns_to_go: Float[Tensor, "B T"], observations: Float[Tensor, "B T S"]
    ) -> Float[Tensor, "B T"]:
        """The return-to-go minus the value of each state, in full float32: a small difference of large numbers."""
        low, high = self.bounds
        return torch.clamp(returns_to_go.float() - self(observations), low, high)

"""The small networks of values and of policies that look at one step."""

from __future__ import annotations

from torch import nn

from dt_ray.config.schema import ModelConfig, PerceptronConfig


def make_perceptron(inputs: int, outputs: int, config: ModelConfig | PerceptronConfig) -> nn.Sequential:
    """`num_layers` hidden layers of `width`."""
    layers: list[nn.Module] = []
    width = inputs
    for _ in range(config.num_layers):
        layers += [nn.Linear(width, config.width), nn.ReLU()]
        width = config.width
    return nn.Sequential(*layers, nn.Linear(width, outputs))

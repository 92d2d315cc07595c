"""Small models and batches of windows."""

from typing import Any

import numpy as np
import torch
from torch import nn

from dt_ray.config.schema import ModelConfig
from dt_ray.data import Normalizer, slice_windows
from dt_ray.data.spaces import SpaceSpec
from dt_ray.models import DecisionTransformerModel, WindowBatch
from support.examples import make_episodes

SPEC = SpaceSpec(observation_dim=3, action_dim=2, action_low=(-2.0, -1.0), action_high=(2.0, 1.0))


def make_model(layout: Any, **changes: Any) -> DecisionTransformerModel:
    """A small model with a token layout, or with the layout `step` and `conditioning: head`."""
    torch.manual_seed(0)
    settings = {"context_length": 6, "num_layers": 2, "num_heads": 2, "width": 16, "dropout": 0.0, "max_timesteps": 40}
    named = {"conditioning": "head"} if layout == "head" else {"token_layout": layout}
    config = ModelConfig(**named, **{**settings, **changes})
    model = DecisionTransformerModel(config, SPEC)
    for parameter in model.parameters():  # away from zero biases, behind which a mistake could hide
        nn.init.normal_(parameter, std=0.2)
    return model


def make_batch(*, length: int = 6) -> WindowBatch:
    data = make_episodes([9, 4, 12], action_dim=2)
    windows = slice_windows(data, np.array([0, 5, 10, 11, 14, 24]), length=length)
    return WindowBatch.from_windows(windows, Normalizer.fit(data, SPEC))


def as_float64(batch: WindowBatch) -> WindowBatch:
    return batch.map(lambda x: x.double() if x.is_floating_point() else x)

"""The Decision Transformer (Chen et al. 2021, https://arxiv.org/abs/2106.01345), with two ways to make tokens.

Legend: B windows, T window length, S observation, A action dimension, D width.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from dt_ray.config.schema import ModelConfig
from dt_ray.data.spaces import SpaceSpec
from dt_ray.models.batch import WindowBatch
from dt_ray.models.linear import Linear
from dt_ray.models.state_values import StateValues
from dt_ray.models.transformer import ACTIVATIONS, ALL_ROWS, Dropout, KeyValueCache, Transformer

NEWEST = slice(-1, None)


class TimestepTable(nn.Embedding):
    """A row for each timestep; with `clamp_timesteps` all later ones share the last."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config.max_timesteps, config.width)
        self.clamps = config.clamp_timesteps

    def forward(self, input: Int[Tensor, "*any"]) -> Float[Tensor, "*any D"]:
        return super().forward(input.clamp(max=self.num_embeddings - 1) if self.clamps else input)


class DecisionTransformerModel(nn.Module):
    """Predicts, at every step, the action that leads from there to the return-to-go.

    No padding mask is taken. Windows are padded on the right, so under a causal mask a real step can never see
    padding, and what is computed at padding is dropped by the loss.
    """

    def __init__(self, config: ModelConfig, spec: SpaceSpec) -> None:
        super().__init__()
        self.config, self.action_dim = config, spec.action_dim
        self.tokens = TOKEN_LAYOUTS[config.token_layout](config, spec)
        self.transformer = Transformer(
            num_layers=config.num_layers,
            num_heads=config.num_heads,
            width=config.width,
            activation=config.activation,
            dropout=config.dropout,
            band=config.context_length if config.attention == "band" else None,
        )
        self.predict_action = nn.Sequential(Linear(config.width, spec.action_dim), nn.Tanh())
        self.apply(_initialize)
        self.values = None if config.values is None else StateValues(spec.observation_dim, config.values)

    def forward(self, windows: WindowBatch) -> Float[Tensor, "B T A"]:
        return self.predict_actions(windows)

    def predict_actions(self, windows: WindowBatch) -> Float[Tensor, "B T A"]:
        """Actions in [-1, 1], each from the steps up to its own."""
        return self.predict_action(self.transformer(self._embed(windows), read=self.tokens.action_rows))

    def predict_last_action(self, windows: WindowBatch, *, padded: bool = True) -> Float[Tensor, "B A"]:
        """The action at the last real step of each window.

        `padded=False` promises that every step is real; the last block then computes one row a window.
        """
        if padded:
            return last_step(self.predict_actions(windows), windows.mask)
        tokens = self._embed(windows)
        if self.config.token_layout == "triplet":
            tokens = tokens[:, :-1]  # the newest action is what is asked for
        return self.predict_action(self.transformer(tokens, read=NEWEST))[:, 0]

    def predict_next_action(self, newest: WindowBatch, cache: KeyValueCache) -> Float[Tensor, "B A"]:
        """The action at the newest step, from windows of that step alone and what the cache keeps of those before.

        Under `attention: band` it is the action that the whole episode so far would give.
        """
        return self.predict_action(self.transformer.step(self._embed(newest)[:, 0], cache))

    def _embed(self, windows: WindowBatch) -> Float[Tensor, "B N D"]:
        if self.values is not None:
            windows = replace(windows, returns_to_go=self.values.relative(windows.returns_to_go, windows.observations))
        return self.tokens(windows)


class StepTokens(nn.Module):
    """One token a step, from its return-to-go, observation, previous action and timestep.

    Two layers, because here they can't meet by attention, as three tokens can: with one, returns were lower.
    """

    action_rows = ALL_ROWS

    def __init__(self, config: ModelConfig, spec: SpaceSpec) -> None:
        super().__init__()
        num_inputs = 1 + spec.observation_dim + spec.action_dim
        self.embed_step = nn.Sequential(
            Linear(num_inputs, config.width), ACTIVATIONS[config.activation](), Linear(config.width, config.width)
        )
        self.embed_timestep = TimestepTable(config)
        self.norm = nn.LayerNorm(config.width)
        self.dropout = Dropout(config.dropout)

    def forward(self, windows: WindowBatch) -> Float[Tensor, "B T D"]:
        step = torch.cat([windows.returns_to_go[..., None], windows.observations, windows.previous_actions], dim=-1)
        return self.dropout(self.norm(self.embed_step(step) + self.embed_timestep(windows.timesteps)))


class TripletTokens(nn.Module):
    """The paper's tokens, R0 o0 a0 R1 o1 a1 ...; actions are read at observation tokens."""

    action_rows = slice(1, None, 3)

    def __init__(self, config: ModelConfig, spec: SpaceSpec) -> None:
        super().__init__()
        self.embed_return = Linear(1, config.width)
        self.embed_observation = Linear(spec.observation_dim, config.width)
        self.embed_action = Linear(spec.action_dim, config.width)
        self.embed_timestep = TimestepTable(config)
        self.norm = nn.LayerNorm(config.width)
        self.dropout = Dropout(config.dropout)

    def forward(self, windows: WindowBatch) -> Float[Tensor, "B 3T D"]:
        time = self.embed_timestep(windows.timesteps)
        tokens = torch.stack(
            [
                self.embed_return(windows.returns_to_go[..., None]) + time,
                self.embed_observation(windows.observations) + time,
                self.embed_action(windows.actions) + time,
            ],
            dim=2,
        )  # [B, T, 3, D]
        return self.dropout(self.norm(tokens.flatten(1, 2)))


TOKEN_LAYOUTS = {"step": StepTokens, "triplet": TripletTokens}


def last_step(values: Float[Tensor, "B T *rest"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B *rest"]:
    """The values at the last real step of each window, padding being on the right."""
    return values[torch.arange(values.shape[0], device=values.device), mask.sum(dim=1) - 1]  # `len` can't be exported


def _initialize(module: nn.Module) -> None:
    """Normal weights of standard deviation 0.02 and no bias, as in GPT-2; norms start as the identity."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)

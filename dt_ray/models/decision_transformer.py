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
from dt_ray.models.return_ceiling import ReturnCeiling, below
from dt_ray.models.state_values import StateValues
from dt_ray.models.transformer import ACTIVATIONS, ALL_ROWS, Dropout, KeyValueCache, Transformer

NEWEST = slice(-1, None)


class TimestepTable(nn.Embedding):
    """A row for each timestep; with `clamp_timesteps` all later ones share the last."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config.max_timesteps, config.width)  # pyright: ignore[reportUnknownMemberType]
        self.clamps = config.clamp_timesteps

    def forward(self, input: Int[Tensor, "*any"]) -> Float[Tensor, "*any D"]:
        return super().forward(input.clamp(max=self.num_embeddings - 1) if self.clamps else input)


class DecisionTransformerModel(nn.Module):
    """Predicts, at every step, the action that leads from there to the return-to-go.

    With `conditioning: tokens` the return-to-go of each step is in that step's token, as in the paper. With `head` no
    token holds one: the transformer looks at what happened, and only the action head is told what is still wanted, as
    how far that lies below the most that the state can give (`ReturnCeiling`). The wish at a step then depends on
    nothing that was wished before, and what is out of reach means as much as can be had.

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
        conditioned = config.conditioning == "head"
        if conditioned:
            self.predict_action: nn.Module = ConditionedHead(config.width, spec.action_dim)
        else:
            self.predict_action = nn.Sequential(Linear(config.width, spec.action_dim), nn.Tanh())
        self.apply(_initialize)
        self.values = None if config.values is None else StateValues(spec.observation_dim, config.values)
        has_ceiling = conditioned and self.values is None
        self.ceiling = ReturnCeiling(spec.observation_dim, config.max_timesteps) if has_ceiling else None

    @property
    def takes_max(self) -> bool:
        """Whether it knows how much a state can give: an infinite return-to-go then asks for as much."""
        return self.values is not None or self.ceiling is not None

    def forward(self, windows: WindowBatch) -> tuple[Float[Tensor, "B T A"], Float[Tensor, "B T"] | None]:
        """What training needs: the actions, and where the model has a `ReturnCeiling` that of each step."""
        windows, ceilings = self._relative(windows)
        features = self.transformer(self.tokens(windows), read=self.tokens.action_rows)
        return self._act(features, windows.returns_to_go), ceilings

    def predict_actions(self, windows: WindowBatch) -> Float[Tensor, "B T A"]:
        """Actions in [-1, 1], each from the steps up to its own."""
        return self(windows)[0]

    def predict_last_action(self, windows: WindowBatch, *, padded: bool = True) -> Float[Tensor, "B A"]:
        """The action at the last real step of each window.

        `padded=False` promises that every step is real; the last block then computes one row a window.
        """
        if padded:
            return last_step(self.predict_actions(windows), windows.mask)
        windows, _ = self._relative(windows)
        tokens = self.tokens(windows)
        if self.config.token_layout == "triplet":
            tokens = tokens[:, :-1]  # the newest action is what is asked for
        return self._act(self.transformer(tokens, read=NEWEST), windows.returns_to_go[:, NEWEST])[:, 0]

    def predict_next_action(self, newest: WindowBatch, cache: KeyValueCache) -> Float[Tensor, "B A"]:
        """The action at the newest step, from windows of that step alone and what the cache keeps of those before.

        Under `attention: band` it is the action that the whole episode so far would give.
        """
        newest, _ = self._relative(newest)
        return self._act(self.transformer.step(self.tokens(newest)[:, 0], cache), newest.returns_to_go[:, 0])

    def _relative(self, windows: WindowBatch) -> tuple[WindowBatch, Float[Tensor, "B T"] | None]:
        """The windows with what is asked for counted from each state's value or ceiling, and the ceilings."""
        if self.values is not None:
            to_go = self.values.relative(windows.returns_to_go, windows.observations)
            return replace(windows, returns_to_go=to_go), None
        if self.ceiling is None:
            return windows, None
        ceilings = self.ceiling(windows.observations, windows.timesteps)
        return replace(windows, returns_to_go=below(windows.returns_to_go, ceilings)), ceilings

    def _act(self, features: Float[Tensor, "*any D"], wished: Float[Tensor, "*any"]) -> Float[Tensor, "*any A"]:
        if isinstance(self.predict_action, ConditionedHead):
            return self.predict_action(features, wished)
        return self.predict_action(features)


class ConditionedHead(nn.Module):
    """Actions from what the transformer has seen, and from what is wished at that step.

    The wish scales and shifts the features (FiLM, Perez et al. 2018), as in the decoupled Decision Transformer (arXiv
    2601.15953); two layers then make the action of them.
    """

    def __init__(self, width: int, action_dim: int) -> None:
        super().__init__()
        self.embed_wish = nn.Sequential(nn.Linear(1, width), nn.GELU(), nn.Linear(width, 2 * width))
        self.act = nn.Sequential(Linear(width, width), nn.GELU(), Linear(width, action_dim), nn.Tanh())

    def forward(self, features: Float[Tensor, "*any D"], wished: Float[Tensor, "*any"]) -> Float[Tensor, "*any A"]:
        scale, shift = self.embed_wish(wished[..., None]).chunk(2, dim=-1)
        return self.act(features * (1 + scale) + shift)


class StepTokens(nn.Module):
    """One token a step, from its observation, previous action and timestep, and its return-to-go if tokens hold it.

    Two layers, because here they can't meet by attention, as three tokens can: with one, returns were lower.
    """

    action_rows = ALL_ROWS

    def __init__(self, config: ModelConfig, spec: SpaceSpec) -> None:
        super().__init__()
        self.holds_returns = config.conditioning == "tokens"
        num_inputs = self.holds_returns + spec.observation_dim + spec.action_dim
        self.embed_step = nn.Sequential(
            Linear(num_inputs, config.width), ACTIVATIONS[config.activation](), Linear(config.width, config.width)
        )
        self.embed_timestep = TimestepTable(config)
        self.norm = nn.LayerNorm(config.width)
        self.dropout = Dropout(config.dropout)

    def forward(self, windows: WindowBatch) -> Float[Tensor, "B T D"]:
        returns = [windows.returns_to_go[..., None]] if self.holds_returns else []
        step = torch.cat([*returns, windows.observations, windows.previous_actions], dim=-1)
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
    """Normal weights of standard deviation 0.02 and no bias, as in GPT-2; norms start as the identity.

    What embeds a wish, a single number, starts as PyTorch has it: its first layer spreads over the numbers there are.
    """
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
    if isinstance(module, ConditionedHead):  # after its parts
        for layer in (module.embed_wish[0], module.embed_wish[2]):
            layer.reset_parameters()  # type: ignore[operator]

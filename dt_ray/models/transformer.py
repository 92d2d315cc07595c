"""A causal transformer with pre-norm blocks that computes, in its last block, only the rows that are read.

Under a band, a token sees only so many tokens, itself and those just before it, in every block. What was computed for a
token then never changes, whatever comes later or falls out of sight: its key and value can be kept (`KeyValueCache`).

Legend: B sequences, L tokens, R rows read, H heads, D width, N live episodes, K tokens of the band.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial
from typing import cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from dt_ray.models.linear import Linear, linear

ALL_ROWS = slice(None)
ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU, "gelu_tanh": partial(nn.GELU, approximate="tanh")}


class Transformer(nn.Module):
    """Blocks, then a final norm, over tokens that see themselves and what came before."""

    def __init__(
        self, *, num_layers: int, num_heads: int, width: int, activation: str, dropout: float, band: int | None = None
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(num_heads, width, activation, dropout, band) for _ in range(num_layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Float[Tensor, "B L D"], *, read: slice = ALL_ROWS) -> Float[Tensor, "B R D"]:
        """The outputs at the rows `read`."""
        last = len(self.blocks) - 1
        for i, block in enumerate(self.blocks):
            tokens = block(tokens, read=read if i == last else ALL_ROWS)
        return self.norm(tokens)

    def set_band(self, band: int) -> None:
        """Lets every token see so many tokens, in every block."""
        for block in cast(Iterable[Block], self.blocks):
            block.attention.band = band

    def step(self, token: Float[Tensor, "N D"], cache: KeyValueCache) -> Float[Tensor, "N D"]:
        """The output at one more token of each sequence, from the keys and values of those before it."""
        for layer, block in enumerate(cast(Iterable[Block], self.blocks)):
            token = block.step(token, cache, layer)
        return self.norm(token)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, num_heads: int, width: int, activation: str, dropout: float, band: int | None) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = CausalAttention(num_heads, width, dropout, band)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            Linear(width, 4 * width), ACTIVATIONS[activation](), Linear(4 * width, width), Dropout(dropout)
        )

    def forward(self, x: Float[Tensor, "B L D"], *, read: slice = ALL_ROWS) -> Float[Tensor, "B R D"]:
        x = x[:, read] + self.attention(self.attention_norm(x), read=read)
        return x + self.mlp(self.mlp_norm(x))

    def step(self, x: Float[Tensor, "N D"], cache: KeyValueCache, layer: int) -> Float[Tensor, "N D"]:
        x = x + self.attention.step(self.attention_norm(x), cache, layer)
        return x + self.mlp(self.mlp_norm(x))


class CausalAttention(nn.Module):
    def __init__(self, num_heads: int, width: int, dropout: float, band: int | None) -> None:
        super().__init__()
        self.num_heads, self.band = num_heads, band
        self.query_key_value = Linear(width, 3 * width)
        self.project = Linear(width, width)
        self.dropout = Dropout(dropout)

    def forward(self, x: Float[Tensor, "B L D"], *, read: slice) -> Float[Tensor, "B R D"]:
        length, width = x.shape[1:]
        if read == ALL_ROWS:
            query, key, value = self.query_key_value(x).split(width, dim=-1)
        else:
            weight, bias = self.query_key_value.weight, self.query_key_value.bias
            query = linear(x[:, read], weight[:width], bias[:width])
            key, value = linear(x, weight[width:], bias[width:]).chunk(2, dim=-1)
        query, key, value = self._by_head(query), self._by_head(key), self._by_head(value)
        if self.training and x.device.type == "cpu":
            mixed = self._attend(query, key, value, visible(length, self.band, x.device)[read])
        else:
            # Kernels know this case; an exported program has no length yet.
            is_short = self.band is None or (not torch.compiler.is_exporting() and length <= self.band)
            is_causal = read == ALL_ROWS and is_short
            mixed = F.scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=None if is_causal else visible(length, self.band, x.device)[read],
                dropout_p=self.dropout.rate if self.training else 0.0,
                is_causal=is_causal,
            )
        return self.dropout(self.project(mixed.transpose(1, 2).flatten(2)))

    def step(self, x: Float[Tensor, "N D"], cache: KeyValueCache, layer: int) -> Float[Tensor, "N D"]:
        query, key, value = (self._by_head(part) for part in self.query_key_value(x)[:, None].chunk(3, dim=-1))
        mixed = F.scaled_dot_product_attention(query, *cache.put(layer, key, value))
        return self.project(mixed[:, :, 0].flatten(1))

    def _attend(
        self,
        query: Float[Tensor, "B H R D/H"],
        key: Float[Tensor, "B H L D/H"],
        value: Float[Tensor, "B H L D/H"],
        mask: Bool[Tensor, "R L"],
    ) -> Float[Tensor, "B H R D/H"]:
        """By the formula, product by product: for dropout a CPU has no kernel, and PyTorch's own way takes longer."""
        query, key, value = (part.flatten(0, 1) for part in (query, key, value))  # [B*H, ...]
        unseen = torch.zeros(mask.shape, dtype=query.dtype).masked_fill_(~mask, -math.inf)
        scores = torch.baddbmm(unseen, query, key.transpose(1, 2), alpha=query.shape[-1] ** -0.5)
        mixed = torch.bmm(self.dropout(scores.softmax(dim=-1)), value)
        return cast("Tensor", mixed.unflatten(0, (-1, self.num_heads)))  # pyright: ignore[reportUnknownMemberType]

    def _by_head(self, x: Float[Tensor, "B L D"]) -> Float[Tensor, "B H L D/H"]:
        by_head = cast("Tensor", x.unflatten(-1, (self.num_heads, -1)))  # pyright: ignore[reportUnknownMemberType]
        return by_head.transpose(1, 2)


def visible(length: int, band: int | None, device: torch.device) -> Bool[Tensor, "L L"]:
    """Whether row i may see column j."""
    seen = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return seen if band is None else seen.triu(1 - band)


class Dropout(nn.Module):
    """Inverted dropout (Srivastava et al. 2014), at a rate that is rounded to 2**-16 on a CPU.

    There PyTorch draws each Bernoulli by itself, which takes a twelfth of an update; 16 random bits an element take a
    fifth of that.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0.0:
            return x
        if x.device.type != "cpu":
            return F.dropout(x, self.rate)
        bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
        num_dropped = round(self.rate * 2**16)  # of the values that 16 bits can take
        kept = torch.ge(bits[: x.numel()].view(x.shape), num_dropped - 2**15, out=torch.empty_like(x))
        return x * kept.mul_(2**16 / (2**16 - num_dropped))


class KeyValueCache:
    """The keys and values, in every block, of the last `length` tokens of N sequences that step together.

    A ring: token t stands at t mod `length`. Attention doesn't mind the order, as tokens carry their own timestep.
    """

    def __init__(self, length: int) -> None:
        self.length = length
        self._num_tokens = 0
        self._kept: dict[int, Float[Tensor, "2 N H length D/H"]] = {}  # by layer

    def begin_token(self) -> None:
        """Begins the next token, to which later calls of `put` belong."""
        self._num_tokens += 1

    def put(
        self, layer: int, key: Float[Tensor, "N H 1 D/H"], value: Float[Tensor, "N H 1 D/H"]
    ) -> tuple[Float[Tensor, "N H K D/H"], Float[Tensor, "N H K D/H"]]:
        """Keeps the newest token's key and value in a block; returns those of all tokens that it may see."""
        if layer not in self._kept:
            num, num_heads, _, width = key.shape
            self._kept[layer] = key.new_zeros(2, num, num_heads, self.length, width)
        keys, values = self._kept[layer]
        place = (self._num_tokens - 1) % self.length
        keys[:, :, place], values[:, :, place] = key[:, :, 0], value[:, :, 0]
        num_seen = min(self._num_tokens, self.length)
        return keys[:, :, :num_seen], values[:, :, :num_seen]

    def keep(self, sequences: Int[Tensor, "M"]) -> None:
        """Goes on with these sequences only, by their place."""
        self._kept = {layer: kept[:, sequences] for layer, kept in self._kept.items()}

"""A causal transformer with pre-norm blocks that computes, in its last block, only the rows that are read.

Legend: B sequences, L tokens, R rows read, H heads, D width.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

ALL_ROWS = slice(None)
ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU}


class Transformer(nn.Module):
    """Blocks, then a final norm, over tokens that see themselves and what came before."""

    def __init__(self, *, num_layers: int, num_heads: int, width: int, activation: str, dropout: float) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(num_heads, width, activation, dropout) for _ in range(num_layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Float[Tensor, "B L D"], *, read: slice = ALL_ROWS) -> Float[Tensor, "B R D"]:
        """The outputs at the rows `read`."""
        last = len(self.blocks) - 1
        for i, block in enumerate(self.blocks):
            tokens = block(tokens, read=read if i == last else ALL_ROWS)
        return self.norm(tokens)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, num_heads: int, width: int, activation: str, dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = CausalAttention(num_heads, width, dropout)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), ACTIVATIONS[activation](), nn.Linear(4 * width, width), nn.Dropout(dropout)
        )

    def forward(self, x: Float[Tensor, "B L D"], *, read: slice = ALL_ROWS) -> Float[Tensor, "B R D"]:
        x = x[:, read] + self.attention(self.attention_norm(x), read=read)
        return x + self.mlp(self.mlp_norm(x))


class CausalAttention(nn.Module):
    def __init__(self, num_heads: int, width: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query_key_value = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "B L D"], *, read: slice) -> Float[Tensor, "B R D"]:
        length, width = x.shape[1:]
        if read == ALL_ROWS:
            query, key, value = self.query_key_value(x).split(width, dim=-1)
            mask = None
        else:
            weight, bias = self.query_key_value.weight, self.query_key_value.bias
            query = F.linear(x[:, read], weight[:width], bias[:width])
            key, value = F.linear(x, weight[width:], bias[width:]).split(width, dim=-1)
            mask = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()[read]  # [R, L]
        query, key, value = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # [B, H, rows, D/H]
            for part in (query, key, value)
        )
        mixed = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=mask is None,
            dropout_p=self.dropout.p if self.training else 0.0,
        )
        return self.dropout(self.project(mixed.transpose(1, 2).flatten(2)))

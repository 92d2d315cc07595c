"""Matrix products on a CPU at the rate that its vector units have.

PyTorch gives float32 products to MKL, which leaves AVX-512 unused on processors that are not Intel's: half the rate of
oneDNN, which PyTorch brings along and takes for other types (docs/performance.md).

Legend: I inputs, O outputs.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
FEWEST_MULTIPLICATIONS = 2**19  # below, a call costs more than it saves, all the more on a loaded machine


class Linear(nn.Linear):
    """`nn.Linear`: the same parameters, the same formula, by oneDNN where that is faster."""

    def forward(self, input: Float[Tensor, "*rows I"]) -> Float[Tensor, "*rows O"]:
        return linear(input, self.weight, self.bias)


def linear(
    x: Float[Tensor, "*rows I"], weight: Float[Tensor, "O I"], bias: Float[Tensor, "O"]
) -> Float[Tensor, "*rows O"]:
    """x weight' + bias."""
    if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):  # which choose kernels and types themselves
        return F.linear(x, weight, bias)
    is_for_onednn = x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32 and HAS_ONEDNN
    if not is_for_onednn or x.numel() * weight.shape[0] < FEWEST_MULTIPLICATIONS:
        return F.linear(x, weight, bias)
    if not torch.is_grad_enabled():
        return _product(x.contiguous(), weight, bias)
    return cast("Tensor", _Linear.apply(x, weight, bias))  # pyright: ignore[reportUnknownMemberType]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        gradient = gradients[0].contiguous()
        to_x = _product(gradient, weight.t()) if ctx.needs_input_grad[0] else None
        rows, gradient_rows = x.flatten(0, -2), gradient.flatten(0, -2)
        if weight.shape[0] <= weight.shape[1]:  # the fewer rows on the left, the faster
            to_weight = _product(gradient_rows.t(), rows.t())
        else:
            to_weight = _product(rows.t(), gradient_rows.t()).t()
        return to_x, to_weight, gradient_rows.sum(dim=0)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight' + bias of factors without gaps in memory: with gaps it falls back to loops, 100 times slower."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")

"""What this machine can do: the matrix products of an update and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from ours import configure, make_learner, make_source
from torch.utils._python_dispatch import TorchDispatchMode
from work import Measure, repeated

ONEDNN = torch.ops.mkldnn._linear_pointwise.default
FACTORS = {  # where each operator has its two factors
    torch.ops.aten.mm.default: slice(0, 2),
    torch.ops.aten.bmm.default: slice(0, 2),
    torch.ops.aten.addmm.default: slice(1, 3),
    torch.ops.aten.baddbmm.default: slice(1, 3),
    ONEDNN: slice(0, 2),
}


class RecordProducts(TorchDispatchMode):
    """Notes every matrix product: who makes it, and the shapes and strides of its two factors."""

    def __init__(self) -> None:
        super().__init__()
        self.products: list[tuple[Any, list[tuple[torch.Size, tuple[int, ...]]]]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in FACTORS:
            factors = [(factor.shape, factor.stride()) for factor in args[FACTORS[function]]]
            self.products.append((function, factors))
        return function(*args, **(kwargs or {}))


def products(layout: Literal["step", "triplet"]) -> Callable[[], Measure]:
    """Updates a second if an update were its matrix products alone, in the same order and with the same strides."""

    def build() -> Measure:
        config = configure(layout)
        source = make_source(config)
        learner, recorder = make_learner(config, source), RecordProducts()
        with recorder:
            learner.update(source.batch(0))
        products = [
            (function, *(torch.empty_strided(*factor).normal_() for factor in factors))
            for function, factors in recorder.products
        ]

        @torch.no_grad()
        def multiply() -> None:
            for function, one, other in products:
                if function is ONEDNN:
                    function(one, other, None, "none", [], "")
                else:
                    torch.matmul(one, other)

        return repeated(8, multiply)

    return build


def large_product() -> Measure:
    """GFLOP/s of one large square product."""
    size = 1024
    one, other = torch.randn(size, size), torch.randn(size, size)
    return repeated(10, lambda: one @ other, each=2 * size**3 / 1e9)


MACHINE = {
    "matrix products of an update, step": products("step"),
    "matrix products of an update, triplet": products("triplet"),
    "a product of 1024 x 1024, GFLOP/s": large_product,
}

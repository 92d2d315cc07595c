"""What this machine can do: the matrix products of an update and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from ours import configure, make_learner, make_source
from torch.utils._python_dispatch import TorchDispatchMode
from work import Measure, repeated

PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default}


class RecordProducts(TorchDispatchMode):
    """Notes every matrix product by the shapes and strides of its two factors."""

    def __init__(self) -> None:
        super().__init__()
        self.factors: list[list[tuple[torch.Size, tuple[int, ...]]]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in PRODUCTS:
            self.factors.append([(factor.shape, factor.stride()) for factor in args[-2:]])
        return function(*args, **(kwargs or {}))


def products(layout: Literal["step", "triplet"]) -> Callable[[], Measure]:
    """Updates a second if an update were its matrix products alone, in the same order and with the same strides."""

    def build() -> Measure:
        config = configure(layout)
        source = make_source(config)
        learner, recorder = make_learner(config, source), RecordProducts()
        with recorder:
            learner.update(source.batch(0))
        pairs = [tuple(torch.empty_strided(*factor).normal_() for factor in pair) for pair in recorder.factors]

        @torch.no_grad()
        def multiply() -> None:
            for one, other in pairs:
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

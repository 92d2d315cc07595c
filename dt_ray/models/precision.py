"""How many bits of a float32 number a computation keeps, whatever was chosen around it."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import torch


@contextmanager
def matmul_precision(kind: str) -> Generator[None]:
    """PyTorch's setting for products of float32 matrices, "highest" or "high" (TF32 on a GPU), restored afterwards."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(kind)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def full_float32(device: torch.device) -> Generator[None]:
    """All 32 bits, also within autocast and under TF32: for values, whose small differences are what matters."""
    if torch.compiler.is_exporting():  # which nothing is around, and which knows no such settings
        yield
        return
    with torch.autocast(device.type, enabled=False):
        if torch.compiler.is_compiling():  # a compiled program has one setting for all of it
            yield
            return
        with matmul_precision("highest"):
            yield

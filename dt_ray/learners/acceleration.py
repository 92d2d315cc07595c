"""Faster updates: lower precision, compiled kernels, and memory that is kept between updates."""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from dt_ray.config.schema import OptimConfig
from dt_ray.errors import ResourceError
from dt_ray.models.precision import matmul_precision

MB = 1 << 20
# As in glibc's malloc.h: from this size on a block is the kernel's; so much stays when it is free at the heap's end.
M_MMAP_THRESHOLD, KERNEL_BLOCK = -3, 32 * MB  # the most that glibc takes
M_TRIM_THRESHOLD, KEPT = -1, 256 * MB


def keep_memory() -> None:
    """Makes the C library keep memory that an update frees, so that the next update causes no page faults for it.

    Nothing is done where that library is not glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, KERNEL_BLOCK)
        mallopt(M_TRIM_THRESHOLD, KEPT)


def products_of(config: OptimConfig) -> AbstractContextManager[None]:
    """Sets the precision of float32 products by `optim.precision` (TF32 or exact), and restores it afterwards.

    It must surround forward and backward pass.
    """
    return matmul_precision("high" if config.precision == "tf32" else "highest")


def accelerate(module: nn.Module, config: OptimConfig, device: torch.device | str) -> Callable[..., Any]:
    """The module's forward pass as `optim.precision` and `optim.compile` say; its parameters stay float32.

    Raises:
        ResourceError: compiling for a CPU without a C++ compiler.
    """
    kind = torch.device(device).type
    run: Callable[..., Any] = module
    if config.compile:
        compiler = os.environ.get("CXX", "g++")
        if kind == "cpu" and shutil.which(compiler) is None:
            raise ResourceError(f"optim.compile on a CPU needs a C++ compiler and there is no {compiler}; install one")
        run = torch.compile(module)  # pyright: ignore[reportUnknownMemberType]
    if config.precision != "bfloat16":
        return run

    def run_in_bfloat16(*inputs: Any) -> Any:
        with torch.autocast(kind, dtype=torch.bfloat16):
            return run(*inputs)

    return run_in_bfloat16

"""Fewer bits and compiled kernels for a module's forward and backward pass."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from dt_ray.config import OptimConfig
from dt_ray.errors import ResourceError


def accelerate(module: nn.Module, config: OptimConfig, device: torch.device | str) -> Callable[..., Any]:
    """The module's forward pass as `optim.precision` and `optim.compile` say; its parameters stay float32.

    Raises:
        ResourceError: compiling for a CPU without a C++ compiler.
    """
    kind = torch.device(device).type
    if config.precision == "tf32":
        torch.set_float32_matmul_precision("high")
    run: Callable[..., Any] = module
    if config.compile:
        compiler = os.environ.get("CXX", "g++")
        if kind == "cpu" and shutil.which(compiler) is None:
            raise ResourceError(f"optim.compile on a CPU needs a C++ compiler and there is no {compiler}; install one")
        run = torch.compile(module)
    if config.precision != "bfloat16":
        return run

    def run_in_bfloat16(*inputs: Any) -> Any:
        with torch.autocast(kind, dtype=torch.bfloat16):
            return run(*inputs)

    return run_in_bfloat16

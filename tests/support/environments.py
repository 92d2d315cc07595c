"""Environments that misbehave, and what acts and trains in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from dt_ray.cli.data import main as data_main
from dt_ray.config.loading import read_settings
from dt_ray.config.schema import RunConfig
from dt_ray.jobs.deriving import resolve_settings


def env_id(name: str) -> str:
    return f"support.quirky_environments:{name}-v0"


def settings_of(data: Path, storage: Path, name: str, *overrides: str) -> list[str]:
    return [
        f"env_id={env_id(name)}",
        f"name={name}",
        f"storage_path={storage}/runs",
        f"data.path={data}",
        "data.collect=null",
        "data.return_noise=0",
        "total_timesteps=4",
        "scaling.num_workers=0",
        "data.validation_fraction=0.2",
        "model={context_length: 3, num_layers: 1, width: 8, max_timesteps: 20}",
        "optim={batch_size: 8, warmup_steps: 2}",
        "evaluation={num_episodes: 3, every: 2, max_timesteps: 20, target_returns: [-1, -3]}",
        "checkpoint={every: 2, keep: 2}",
        *overrides,
    ]


def config_of(settings: list[str]) -> RunConfig:
    """The configuration that the training command makes of these settings."""
    return resolve_settings(read_settings(None, settings)).config


def collect(name: str, out: Path, *options: str) -> None:
    data_main(["collect", "--env", env_id(name), "--episodes", "8", "--workers", "0", "--out", str(out), *options])


class Constant:
    """A policy whose actions depend on nothing, and whose live episodes may be cut into any parts."""

    def start(self, observations: Any, target_returns: Any) -> None:
        self.num = len(observations)

    def act(self) -> Any:
        return np.full((self.num, 1), 0.1, np.float32)

    def observe(self, *anything: Any) -> None: ...

    def keep(self, episodes: Any) -> None:
        self.num = len(episodes)

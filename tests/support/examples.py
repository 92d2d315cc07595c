"""Small datasets and settings that the tests share."""

from __future__ import annotations

import json
import socket
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from dt_ray.config.schema import RunConfig
from dt_ray.data import TransitionDataset
from dt_ray.data.logs.episodes import to_table
from dt_ray.runs.folder import RunFolder

ROOT = Path(__file__).parents[2]  # of the repository
# `ray start` gives workers ports from one range on the whole machine, on which other test runs start Ray too.
ANY_WORKER_PORT = {"min-worker-port": 0, "max-worker-port": 0}


def make_episodes(
    lengths: Sequence[int], *, observation_dim: int = 3, action_dim: int = 1, seed: int = 0
) -> TransitionDataset:
    """Random episodes of these lengths, each cut by a time limit; actions within [-2, 2]."""
    generator = np.random.default_rng(seed)
    num = sum(lengths)
    ends = np.cumsum(lengths)
    truncated = np.zeros(num, dtype=bool)
    truncated[ends - 1] = True
    return TransitionDataset(
        observations=generator.normal(size=(num, observation_dim)).astype(np.float32),
        actions=generator.uniform(-2, 2, size=(num, action_dim)).astype(np.float32),
        rewards=generator.normal(size=num).astype(np.float32),
        terminated=np.zeros(num, dtype=bool),
        truncated=truncated,
        starts=ends - np.asarray(lengths),
    )


def write_episodes(data: TransitionDataset, file: Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(to_table(data), file)
    return file


def tiny_overrides(data: Path, storage: Path) -> list[str]:
    return [
        "name=tiny",
        f"storage_path={storage}/runs",
        f"data.path={data}",
        "data.collect=null",
        "data.return_noise=0",
        "total_timesteps=20",
        "scaling.num_workers=0",
        "data.validation_fraction=0.2",
        "model={context_length: 4, num_layers: 1, width: 16, dropout: 0.1, max_timesteps: 60}",
        "optim={batch_size: 8, warmup_steps: 2}",
        "evaluation={num_episodes: 2, every: 10, max_timesteps: 20, target_returns: [-100, -300]}",
        "checkpoint={every: 5, keep: 2}",
        "logging.every=5",
    ]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def with_workers(config: RunConfig, num_workers: int, **changes: Any) -> RunConfig:
    """The same run on so many of Ray's workers."""
    scaling = replace(config.scaling, num_workers=num_workers)
    return replace(config, name=f"workers-{num_workers}", scaling=scaling, **changes)


def losses_of(run: RunFolder) -> list[float]:
    """The training losses that a run has logged."""
    return [json.loads(line)["train/loss"] for line in run.metrics_file.read_text().splitlines()]

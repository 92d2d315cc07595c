"""How fast the parts are, each beside a limit of this machine, measured in turns in one run.

    python benchmarks/speed.py [--threads N] [--rounds N] [--json FILE]

Updates: state 11, action 3, context 20, batch 64, 3 layers, 1 head, width 128, dropout 0.1, on random data.
Windows: the resident source, beside a bare NumPy gather of the same contiguous windows.
Evaluation: Pendulum-v1, 100 episodes in one batch, context 20, the context recomputed at every step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from dt_ray.config import DataConfig, EvaluationConfig, ModelConfig, OptimConfig, RunConfig
from dt_ray.data import TransitionDataset
from dt_ray.data.spaces import SpaceSpec, read_spaces
from dt_ray.evaluation import evaluate
from dt_ray.learners import LEARNERS
from dt_ray.sources import ResidentData, ResidentSource

SPEC = SpaceSpec(observation_dim=11, action_dim=3, action_low=(-1.0,) * 3, action_high=(1.0,) * 3)
MODEL = ModelConfig(context_length=20, num_layers=3, num_heads=1, width=128, dropout=0.1)
UPDATES_A_ROUND, BATCHES_A_ROUND = 10, 2000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7, help="each figure is the median of so many")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    source = ResidentSource(ResidentData.build(random_episodes(), SPEC, run_config("step")), run_config("step"))
    measures: dict[str, tuple[str, Callable[[], float]]] = {
        "updates, step layout": ("updates/s", updates("step", source)),
        "updates, triplet layout": ("updates/s", updates("triplet", source)),
        "windows, resident source": ("windows/s", windows(source)),
        "windows, bare NumPy gather": ("windows/s", gather(source)),
        "evaluation, 1 target × 100 episodes": ("env steps/s", evaluation((-200.0,), 100)),
        "evaluation, 4 targets × 25 episodes": ("env steps/s", evaluation((-100.0, -300.0, -600.0, -900.0), 25)),
    }
    figures: dict[str, list[float]] = {name: [] for name in measures}
    for _ in range(options.rounds):
        for name, (_, measure) in measures.items():
            figures[name].append(measure())
    table = Table(title=f"{options.threads} thread(s), median of {options.rounds} rounds")
    for column in ("what", "rate", "unit", "lowest .. highest"):
        table.add_column(column, justify="left" if column in ("what", "unit") else "right")
    for name, values in figures.items():
        spread = f"{min(values):,.1f} .. {max(values):,.1f}"
        table.add_row(name, f"{statistics.median(values):,.1f}", measures[name][0], spread)
    Console(width=110).print(table)
    if options.json:
        Path(options.json).write_text(json.dumps({"threads": options.threads, "figures": figures}, indent=1) + "\n")


def run_config(layout: str) -> RunConfig:
    model = ModelConfig(**{**vars(MODEL), "token_layout": layout})
    return RunConfig(model=model, data=DataConfig(validation_fraction=0.0), optim=OptimConfig(batch_size=64))


def random_episodes(num_episodes: int = 500, length: int = 500) -> TransitionDataset:
    generator, num = np.random.default_rng(0), num_episodes * length
    return TransitionDataset(
        observations=generator.normal(size=(num, SPEC.observation_dim)).astype(np.float32),
        actions=generator.uniform(-1, 1, size=(num, SPEC.action_dim)).astype(np.float32),
        rewards=generator.normal(size=num).astype(np.float32),
        starts=np.arange(num_episodes) * length,
    )


def rate(count: float, work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return count / (time.perf_counter() - began)


def updates(layout: str, source: ResidentSource) -> Callable[[], float]:
    learner = LEARNERS["decision_transformer"](run_config(layout), SPEC, source.normalizer)

    def measure() -> float:
        return rate(UPDATES_A_ROUND, lambda: [learner.update(source.batch(k)) for k in range(UPDATES_A_ROUND)])

    measure()  # warm up
    return measure


def windows(source: ResidentSource) -> Callable[[], float]:
    return lambda: rate(BATCHES_A_ROUND * 64, lambda: [source.batch(k) for k in range(BATCHES_A_ROUND)])


def gather(source: ResidentSource) -> Callable[[], float]:
    """The same windows as contiguous runs, at rows that are known beforehand."""
    rows = source.train.blocks.numpy()
    draws = np.random.default_rng(0).integers(len(rows), size=(BATCHES_A_ROUND, 64))
    out = np.empty((64, rows.shape[1]), np.float32)

    def take() -> None:
        for draw in draws:
            out[:] = rows[draw]

    return lambda: rate(BATCHES_A_ROUND * 64, take)


def evaluation(targets: tuple[float, ...], num_episodes: int) -> Callable[[], float]:
    model = ModelConfig(**{**vars(MODEL), "dropout": 0.0})
    config = RunConfig(
        model=model,
        evaluation=EvaluationConfig(target_returns=targets, num_episodes=num_episodes),
        data=DataConfig(validation_fraction=0.0),
    )
    spec = read_spaces("Pendulum-v1")
    generator = np.random.default_rng(0)
    data = TransitionDataset(
        observations=generator.normal(size=(200, 3)).astype(np.float32),
        actions=generator.uniform(-2, 2, size=(200, 1)).astype(np.float32),
        rewards=-generator.random(200).astype(np.float32),
        starts=np.array([0]),
    )
    source = ResidentSource(ResidentData.build(data, spec, config), config)
    policy = LEARNERS["decision_transformer"](config, spec, source.normalizer).policy()
    return lambda: evaluate(policy, "Pendulum-v1", config.evaluation, step=0)["env_steps_per_s"]


if __name__ == "__main__":
    main()

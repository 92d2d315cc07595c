"""What the variants of the preset reach over several seeds: at the same updates, and at the same wall time.

    python benchmarks/variants.py [--seeds N] [--jobs N] [--only VARIANT ...] [--updates N] [--json FILE]

Every run has one thread. "At equal time" gives a variant as many updates as the preset's wall time would have allowed
it, at rates measured in turns before anything is trained; its learning rate schedule is as long as its run.
Returns are means over 100 episodes at the highest target return, on the seeds 0..99 that the preset was tuned on and on
1000..1099, which no choice has looked at.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from dt_ray.config.loading import load_config
from dt_ray.config.schema import DEFAULT_CONFIG, RunConfig
from dt_ray.data import read_dataset
from dt_ray.data.spaces import read_spaces
from dt_ray.jobs.dataset import make_dataset, needs_dataset
from dt_ray.learners import LEARNERS
from dt_ray.play.collection import collect_here
from dt_ray.play.evaluation import evaluate
from dt_ray.training.resident import ResidentData, ResidentSource

VARIANTS: dict[str, list[str]] = {
    "preset": [],
    "window": ["model.attention=window", "data.window_length=null", "optim.batch_size=128"],
    "triplet": ["model.attention=window", "model.token_layout=triplet", "optim.batch_size=128"],
    # As many steps in a batch as 128 windows of the context's length have.
    "band, windows of 2": ["model.attention=band", "data.window_length=20", "optim.batch_size=64"],
    "band, windows of 4": ["model.attention=band", "data.window_length=40", "optim.batch_size=32"],
}
EVALUATION_SEEDS = (0, 1000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, one thread each")
    parser.add_argument("--only", nargs="*", default=list(VARIANTS), choices=VARIANTS, metavar="VARIANT")
    parser.add_argument("--updates", type=int, help="instead of the preset's")
    parser.add_argument("--equal-time", action="store_true", help="also at the wall time that the preset takes")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    preset = settings("preset")
    if needs_dataset(preset):
        make_dataset(preset, collect_here)
    rates = measure_rates(options.only) if options.equal_time else {}
    num_updates = options.updates or preset.total_timesteps
    cases = [(name, num_updates) for name in options.only]
    cases += [(name, round(num_updates * rates[name] / rates["preset"])) for name in rates if name != "preset"]
    with ProcessPoolExecutor(options.jobs) as pool:
        futures = {case: [pool.submit(train, *case, seed) for seed in range(options.seeds)] for case in cases}
        outcomes = {case: [future.result() for future in runs] for case, runs in futures.items()}
    table = Table(title=f"returns at target {max(preset.evaluation.target_returns):g}, {options.seeds} training seeds")
    for column in ("variant", "updates", "train s", *(f"seeds {seed}.." for seed in EVALUATION_SEEDS), "each"):
        table.add_column(column)
    for (name, updates), runs in outcomes.items():
        means = [statistics.mean(run["returns"][i] for run in runs) for i in range(len(EVALUATION_SEEDS))]
        each = ", ".join(f"{run['returns'][0]:.1f}" for run in runs)
        seconds = statistics.median(run["train_s"] for run in runs)
        table.add_row(name, str(updates), f"{seconds:.0f}", *(f"{mean:.1f}" for mean in means), each)
    Console(width=120).print(table)
    if options.json:
        figures = [{"variant": name, "updates": num, "runs": runs} for (name, num), runs in outcomes.items()]
        Path(options.json).write_text(json.dumps({"rates": rates, "figures": figures}, indent=1) + "\n")


def settings(variant: str) -> RunConfig:
    return load_config(DEFAULT_CONFIG, [*VARIANTS[variant], "scaling.num_workers=0"])


def make_source(config: RunConfig) -> ResidentSource:
    assert config.env_id is not None
    spec = read_spaces(config.env_id)
    return ResidentSource(ResidentData.build(read_dataset(config.data, spec), spec, config), config)


def measure_rates(names: list[str], *, rounds: int = 5, updates: int = 30) -> dict[str, float]:
    """Updates a second of each variant and the preset, the median of rounds in which they take turns."""
    torch.set_num_threads(1)
    configs = {name: settings(name) for name in dict.fromkeys(["preset", *names])}
    sources = {name: make_source(config) for name, config in configs.items()}
    learners = {
        name: LEARNERS[config.algorithm](config, sources[name].spec, sources[name].normalizer)
        for name, config in configs.items()
    }
    figures: dict[str, list[float]] = {name: [] for name in configs}
    for _ in range(rounds):
        for name, learner in learners.items():
            began = time.perf_counter()
            for _ in range(updates):
                learner.update(sources[name].batch(learner.step))
            figures[name].append(updates / (time.perf_counter() - began))
    return {name: statistics.median(values) for name, values in figures.items()}


def train(variant: str, num_updates: int, seed: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    config = replace(settings(variant), seed=seed, total_timesteps=num_updates)
    source = make_source(config)
    learner = LEARNERS[config.algorithm](config, source.spec, source.normalizer)
    began = time.perf_counter()
    for step in range(num_updates):
        learner.update(source.batch(step))
    train_s = time.perf_counter() - began
    returns = []
    for first in EVALUATION_SEEDS:
        assert config.env_id is not None
        best = max(config.evaluation.target_returns)
        evaluation = replace(config.evaluation, seed=first, target_returns=(best,))
        returns.append(evaluate(learner.policy(), config.env_id, evaluation, step=num_updates).targets[0].return_mean)
    return {"seed": seed, "train_s": train_s, "returns": returns}


if __name__ == "__main__":
    main()

"""How far from the return that was asked for each episode ends, over several training seeds.

    python benchmarks/obedience.py [--seeds N] [--folder DIR] [section.key=value ...]
    python benchmarks/obedience.py --env Hopper-v5 --data LOG total_timesteps=4000
    python benchmarks/obedience.py --select data.balance=0.75

Without a log it is Pendulum's main job, with one the neutral configuration. Target returns are spread over what the
log has; `max`, as much as can be had, is asked for beside them. Settings are chosen with `--select`, on the seeds
2000..2099 and nothing else; reports are on 0..99 and 1000..1099. Runs lie in `--folder` by their settings, and what is
there is not run again.
"""

from __future__ import annotations

import argparse
import hashlib
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from kept import trained
from numpy import ndarray
from rich.console import Console
from rich.table import Table

from dt_ray.config.loading import read_settings
from dt_ray.config.schema import RunConfig
from dt_ray.config.targets import show_target
from dt_ray.data import read_dataset
from dt_ray.data.spaces import needed_environment, read_spaces
from dt_ray.jobs.deriving import resolve_settings
from dt_ray.play.evaluation import evaluate
from dt_ray.runs.checkpoint import load_policy
from dt_ray.runs.evaluation_report import EvaluationReport, TargetResult
from dt_ray.runs.folder import checkpoint_at
from dt_ray.runs.storage import Folder

SELECTION_SEEDS, REPORT_SEEDS = (2000,), (0, 1000)
NUM_TARGETS = 7
SUPPORT = 0.02, 0.98  # quantiles of the log's returns between which targets are spread


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--seeds", type=int, default=3, help="training seeds")
    parser.add_argument("--episodes", type=int, default=100, help="for each target return")
    parser.add_argument("--env", metavar="ID", help="with --data")
    parser.add_argument("--data", metavar="LOG")
    parser.add_argument("--select", action="store_true", help="on the seeds that settings are chosen by")
    parser.add_argument("--folder", type=Path, default=Path("obedience"))
    options = parser.parse_args()
    torch.set_num_threads(1)  # small models: a second thread only waits
    named = [] if options.data is None else [f"env_id={options.env}", f"data.path={options.data}"]
    configs = [configured([*named, *options.overrides], seed, options.folder) for seed in range(options.seeds)]
    runs = [trained(config).folder for config in configs]
    returns = logged_returns(configs[0])
    targets = spread_targets(returns, configs[0])
    for first in SELECTION_SEEDS if options.select else REPORT_SEEDS:
        reports = [
            play(run, config, targets, first=first, num_episodes=options.episodes)
            for run, config in zip(runs, configs, strict=True)
        ]
        title = f"{configs[0].env_id}, seeds {first}..{first + options.episodes - 1}, {options.seeds} training seeds"
        Console(width=120).print(table(reports, title=title, width=float(returns.max() - returns.min())))


def configured(overrides: Sequence[str], seed: int, folder: Path) -> RunConfig:
    digest = hashlib.sha256("\n".join(sorted(overrides)).encode()).hexdigest()[:8]
    placed = [f"name={digest}-{seed}", f"storage_path={folder.absolute() / 'runs'}", f"seed={seed}"]
    usual = ["scaling.num_workers=0", "evaluation.every=0", "checkpoint.every=1000"]
    return resolve_settings(read_settings(None, [*usual, *overrides, *placed])).config


def logged_returns(config: RunConfig) -> Float[ndarray, "E"]:
    return read_dataset(config.data, read_spaces(needed_environment(config.env_id, "this benchmark"))).episode_returns


def spread_targets(returns: Float[ndarray, "E"], config: RunConfig) -> tuple[float, ...]:
    """As much as can be had, if the policy knows how much that is, and numbers within the log's returns."""
    low, high = np.quantile(returns, SUPPORT).tolist()
    numbers = (np.linspace(low, high, NUM_TARGETS).round()[::-1] + 0.0).tolist()  # no -0
    return (math.inf, *numbers) if config.takes_max else tuple(numbers)


def play(
    run: Folder, config: RunConfig, targets: tuple[float, ...], *, first: int, num_episodes: int
) -> EvaluationReport:
    evaluation = replace(config.evaluation, target_returns=targets, seed=first, num_episodes=num_episodes)
    policy, facts = load_policy(checkpoint_at(run))
    return evaluate(policy, needed_environment(config.env_id, "this benchmark"), evaluation, step=facts.step)


def table(reports: Sequence[EvaluationReport], *, title: str, width: float) -> Table:
    """Distances are of all episodes of all training seeds together; `width` is the range of the log's returns."""
    found = Table(title=title)
    for column in ("asked", "reached", "each training seed", "off by, median", "90%", "median / range", "90% / range"):
        found.add_column(column, justify="right")
    of_targets = [[report.targets[place] for report in reports] for place in range(len(reports[0].targets))]
    for results in of_targets:
        means = [result.return_mean for result in results]
        cells = [f"{np.mean(means):.1f}", " ".join(f"{mean:.0f}" for mean in means)]
        found.add_row(show_target(results[0].target_return), *cells, *describe(results, width))
    numbers = [result for results in of_targets for result in results if math.isfinite(result.target_return)]
    found.add_row("all numbers", "", "", *describe(numbers, width))
    return found


def describe(results: Sequence[TargetResult], width: float) -> list[str]:
    off = np.concatenate([np.abs(np.array(each.episode_returns) - each.target_return) for each in results])
    if not np.isfinite(off).all():
        return ["–"] * 4
    median, most = np.quantile(off, [0.5, 0.9])
    return [f"{median:.0f}", f"{most:.0f}", f"{median / width:.1%}", f"{most / width:.1%}"]


if __name__ == "__main__":
    main()

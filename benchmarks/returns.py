"""Returns of every algorithm on every kind of data: Pendulum-v1, seeds 0..99, after training with several seeds.

    python benchmarks/returns.py [--seeds N] [--folder DIR]

Algorithms: the presets of the Decision Transformer, plain and with learned values, asked for -130; of behaviour cloning
on all episodes and on the best tenth of them; of implicit Q-learning. Data: 2,000 random, medium, expert or mixed
episodes. Each algorithm is a sweep over data and seeds in `--folder`, that with values a run for each; what is there is
not run again, so that it can be stopped at any time.
"""

from __future__ import annotations

import argparse
import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from rich.console import Console

from dt_ray.config.loading import find_config, load_config, read_yaml
from dt_ray.config.schema import RunConfig
from dt_ray.jobs.sweep import run_sweep
from dt_ray.jobs.training import start_run
from dt_ray.play.collection import CollectionPlan, collect_here, write_dataset
from dt_ray.runs.folder import RunFolder
from dt_ray.runs.intervals import student_interval
from dt_ray.sweeps.config import SweepConfig
from dt_ray.sweeps.folder import SweepFolder
from dt_ray.sweeps.loading import decode_sweep
from dt_ray.sweeps.tables import read_rows

ALGORITHMS = {
    "decision_transformer": ("decision_transformer/pendulum", []),
    "behavior_cloning": ("behavior_cloning/pendulum", ["data.top_fraction=1"]),
    "behavior_cloning-best_tenth": ("behavior_cloning/pendulum", []),
    "iql": ("iql/pendulum_random", []),
}
STITCHING = "decision_transformer/pendulum_stitching"
BEHAVIORS = ("random", "medium", "expert", "mixed")
NUM_EPISODES = 2000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path("returns"))
    options = parser.parse_args()
    data = [collect(behavior, options.folder) for behavior in BEHAVIORS]
    lines = ["| | " + " | ".join(BEHAVIORS) + " |", "|---|" + "---|" * len(BEHAVIORS)]
    for name, (config, overrides) in ALGORITHMS.items():
        sweep = make_sweep(name, config, overrides, data=data, folder=options.folder, num_seeds=options.seeds)
        run_sweep(sweep, resume=SweepFolder.of(sweep).is_sweep())
        cells = [describe(sweep, path) for path in data]
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
        Console(width=140).print("\n".join(lines), markup=False)
    with_values = stitch(data, folder=options.folder, num_seeds=options.seeds)
    lines.append(f"| `{STITCHING}` | " + " | ".join(with_values) + " |")
    Console(width=140).print("\n".join(lines), markup=False)


def collect(behavior: str, folder: Path) -> str:
    """The folder of the episodes of a behaviour, which are played if they aren't there."""
    path = folder.absolute() / "data" / behavior
    if not path.exists():
        plan = CollectionPlan(
            env_id="Pendulum-v1", behavior=behavior, num_episodes=NUM_EPISODES, seed=100_000, max_timesteps=200
        )
        write_dataset(str(path), collect_here(plan), source=plan.source)
    return str(path)


def make_sweep(
    name: str, config: str, overrides: list[str], *, data: list[str], folder: Path, num_seeds: int
) -> SweepConfig:
    tree = {"data.path": {"grid": data}, "data.collect": None, "num_seeds": num_seeds, "evaluation.every": 0}
    tree |= {"evaluation.target_returns": {"grid": [-130]}, "storage_path": str(folder.absolute() / "sweeps")}
    return decode_sweep(tree, read_yaml(find_config(config)), [*overrides, f"name={name}"], default_name=name)


def stitch(data: list[str], *, folder: Path, num_seeds: int) -> list[str]:
    """For each dataset what `describe` says of runs with learned values, each after a run that learns them."""
    configs = {
        path: [
            load_config(
                STITCHING,
                [
                    *(f"name={Path(path).name}-{seed}", f"storage_path={folder.absolute() / 'stitching'}"),
                    *(f"seed={seed}", f"data.path={path}", "data.collect=null", "evaluation.target_returns=[-130]"),
                    *("evaluation.every=0", "scaling.num_workers=0", "scaling.cpus_per_worker=1"),
                ],
            )
            for seed in range(num_seeds)
        ]
        for path in data
    }
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        found = {path: pool.map(train_once, each) for path, each in configs.items()}
        return [describe_means(np.array(list(found[path]))) for path in data]


def train_once(config: RunConfig) -> float:
    """The mean return of a run, which takes place unless it has."""
    summary = RunFolder.of(config).read_summary()
    if summary is None or summary["status"] != "finished":
        summary = start_run(config, overwrite=True).summary
    return summary["last"]["targets"][0]["return_mean"]


def describe(sweep: SweepConfig, path: str) -> str:
    """What `describe_means` says of a sweep's trials on a dataset."""
    rows = read_rows(sweep, SweepFolder.of(sweep))
    return describe_means(
        np.array([row["return_mean"] for row in rows if row["data.path"] == path and "return_mean" in row])
    )


def describe_means(means: Float[ndarray, "N"]) -> str:
    """Mean over training seeds, with its 95% interval (Student's t) where there are several."""
    if len(means) < 2:
        return f"{means.mean():.1f}"
    return f"{means.mean():.1f} ± {np.ptp(student_interval(means)) / 2:.1f}"


if __name__ == "__main__":
    main()

"""What a sweep costs beyond its training: trials by evaluation and by training, and Tune's own time a trial.

    python benchmarks/sweep.py [--updates N] [--json FILE]

- factored: three context lengths and eight target returns train 3 models; each is asked for all eight in one rollout.
- naive: the same grid as 24 trained models, a sweep of three for each target return.
- overhead: ten trials one after the other on a cluster that is warm; what each takes beyond its own wall time of
  training and evaluation.

Both sweeps run in one cluster, in turns; the data is laid out anew for each.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from dt_ray.config.schema import DEFAULT_CONFIG
from dt_ray.distributed.cluster import connection, environment
from dt_ray.distributed.tuning import TUNE_SETTINGS
from dt_ray.jobs.sweep import run_sweep
from dt_ray.sweeps.folder import SweepFolder
from dt_ray.sweeps.loading import DEFAULT_SWEEP, load_sweep

TARGETS = (-130, -250, -400, -550, -700, -850, -1000, -1200)
NUM_TRIALS = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=200, help="of each model")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder, environment(TUNE_SETTINGS), connection():
        common = [f"storage_path={folder}/sweeps", f"total_timesteps={options.updates}", f"data.path={folder}/data"]
        sweep([*common, "name=warm", "total_timesteps=10", "evaluation.num_episodes=2"])
        factored, num_trained = sweep([*common, "name=factored"])
        naive = 0.0
        for target in TARGETS:  # a sweep a target: Tune's own start is not what is measured, see below
            took, num = sweep([*common, f"name=naive{target}", f"evaluation.target_returns=[{target}]"])
            naive, num_trained = naive + took, num_trained + num
        figures["factored, s"], figures["naive, s"], figures["naive / factored"] = factored, naive, naive / factored
        figures["models trained, both"] = num_trained
        figures["overhead of a trial, s"] = overhead([*common, "name=overhead", f"num_seeds={NUM_TRIALS}"])
    table = Table("what", "figure")
    for name, value in figures.items():
        table.add_row(name, f"{value:,.2f}")
    Console(width=120).print(table)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))


def sweep(overrides: Sequence[str]) -> tuple[float, int]:
    """Seconds from the first trial's start to the last one's end, and how many models were trained."""
    loaded = load_sweep(DEFAULT_SWEEP, DEFAULT_CONFIG, overrides, default_name="sweep")
    run_sweep(loaded)
    times = trial_times(SweepFolder.of(loaded))
    return max(end for _, end, _ in times) - min(begin for begin, _, _ in times), len(times)


def overhead(overrides: Sequence[str]) -> float:
    """Mean seconds of a trial that are not its training or evaluation, one trial at a time."""
    loaded = load_sweep(
        DEFAULT_SWEEP, DEFAULT_CONFIG, [*overrides, "model.context_length=5", "max_concurrent=1"], default_name="sweep"
    )
    began = time.time()
    run_sweep(loaded)
    times = trial_times(SweepFolder.of(loaded))
    laid_out = Path(str(SweepFolder.of(loaded))).joinpath("sweep.yaml").stat().st_mtime  # Tune begins here
    assert laid_out > began
    return (max(end for _, end, _ in times) - laid_out - sum(wall for _, _, wall in times)) / len(times)


def trial_times(folder: SweepFolder) -> list[tuple[float, float, float]]:
    """Begin and end of each trial by its files, and its own wall time."""
    times = []
    for name in folder.trial_names():
        place = Path(str(folder.trial(name)))
        summary = json.loads((place / "summary.json").read_text())
        begin, end = (place / "config.yaml").stat().st_mtime, (place / "summary.json").stat().st_mtime
        times.append((begin, end, summary["train_wall_s"]))
    return times


if __name__ == "__main__":
    main()

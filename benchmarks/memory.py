"""Peak memory of a training worker, beside the sizes of its dataset and its model.

    python benchmarks/memory.py [--steps N ...] [--updates N]

A Ray Train worker trains compare.py's model on random data while its peak resident memory is read, what it has mapped
of the object store included. What torch and Ray take by themselves is the peak of the same worker with next to no
dataset and model. A dataset counts as logged: float32 observations, actions and rewards; a model by its parameters.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import pyarrow.parquet as pq
from ours import configure, make_dataset
from rich.console import Console
from rich.table import Table
from work import ACTION, EPISODE_STEPS, STATE, watching

from dt_ray.config.schema import EvaluationConfig, RunConfig
from dt_ray.data.logs.episodes import to_table
from dt_ray.jobs.training import name_run, start_run


class OneStep(gym.Env):
    """The work's dimensions and episodes of one step, so that the evaluation at the end takes nothing."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (STATE,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (ACTION,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        return np.zeros(STATE, np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        return np.zeros(STATE, np.float32), 0.0, True, False, {}


if "OneStep-v0" not in gym.registry:
    gym.register("OneStep-v0", "memory:OneStep")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs="+", default=[1_000_000, 4_000_000], help="of the datasets")
    parser.add_argument("--updates", type=int, default=1500, help="enough to touch nearly every page of the dataset")
    options = parser.parse_args()
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    config = replace(
        configure(),
        env_id="memory:OneStep-v0",  # the worker imports this module for it
        total_timesteps=options.updates,
        evaluation=EvaluationConfig(target_returns=(0.0,), num_episodes=1, max_timesteps=1, num_actors=0),
    )
    least = replace(config, model=replace(config.model, width=8, num_layers=1), total_timesteps=20)
    table = Table(title=f"peak of a training worker, MB; {options.updates} updates")
    for column in ("steps", "dataset", "model", "worker", "torch and Ray's own", "above them / sizes"):
        table.add_column(column, justify="right")
    own, _, _ = measure(least, EPISODE_STEPS)
    for steps in options.steps:
        peak, dataset, model = measure(config, steps)
        ratio = (peak - own) / (dataset + model)
        table.add_row(*(f"{each:,.0f}" for each in (steps, dataset, model, peak, own)), f"{ratio:.2f}")
    Console(width=120).print(table)


def measure(config: RunConfig, num_steps: int) -> tuple[float, float, float]:
    """Peak of the worker, size of the dataset and of the model, in MB."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "episodes.parquet"
        pq.write_table(to_table(make_dataset(num_steps // EPISODE_STEPS)), file, row_group_size=50)
        config = replace(config, data=replace(config.data, path=str(file)), storage_path=folder)
        with peak_of_workers() as peaks:
            result = start_run(name_run(config, "memory"))
    megabyte = 2**20
    dataset = num_steps * (STATE + ACTION + 1) * 4 / megabyte
    return max(peaks.values()) / 1024, dataset, result.summary["num_parameters"] * 4 / megabyte


@contextmanager
def peak_of_workers() -> Iterator[dict[int, int]]:
    """The peak resident memory of each Ray Train worker that lives meanwhile, in kB by process."""
    peaks: dict[int, int] = {}

    def look() -> None:
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError, IndexError):  # it may end while we look
                if b"RayTrainWorker" in (process / "cmdline").read_bytes():
                    status = (process / "status").read_text()
                    peaks[int(process.name)] = int(status.split("VmHWM:")[1].split()[0])

    with watching(look, every_s=0.05):
        yield peaks


if __name__ == "__main__":
    main()

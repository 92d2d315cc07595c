"""What Ray costs, what a second worker brings, where start-up goes, and what follows for many GPUs.

    python benchmarks/scale.py [--updates N] [--rounds N]

Every worker has one thread. Configurations take turns on one cluster, a new worker group each time; a figure is the
median over rounds of the median over the lines of `metrics.jsonl`. The cost of an update of n workers and a global
batch of B windows is fitted to some of them,

    t(n, B) = a + b B / n + c [n > 1]

and compared with the others, which it has not seen.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from dt_ray.config.loading import load_config
from dt_ray.config.schema import RunConfig
from dt_ray.jobs.training import name_run, start_run
from dt_ray.learners.decision_transformer import DecisionTransformerLearner
from dt_ray.runs.folder import RunFolder

FITTED = ((1, 64), (1, 128), (1, 256), (2, 128), (2, 256))
UNSEEN = ((1, 512), (2, 64), (2, 512))
BATCH = 256  # at which overhead and scaling are measured


class TimedLearner(DecisionTransformerLearner):
    """Writes down when it is made and when its first update is done."""

    def __init__(self, config: RunConfig, *args: Any, **placement: Any) -> None:
        super().__init__(config, *args, **placement)
        self.times = Path(str(RunFolder.of(config))).with_suffix(".times")
        self._note("worker has model and data")

    def update(self, *args: Any, **kwargs: Any) -> Any:
        metrics = super().update(*args, **kwargs)
        if self.step == 1:
            self._note("first update done")
        return metrics

    def _note(self, what: str) -> None:
        with self.times.open("a") as file:
            file.write(f"{what}\t{time.time()}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    # A cluster on loopback for some minutes; a client with an address would have to be given its token.
    os.environ |= {"OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "disabled"}
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    folder = Path(tempfile.mkdtemp(prefix="scale"))
    base = load_config(
        "decision_transformer/pendulum",
        [
            *(f"storage_path={folder}/runs", f"data.path={folder}/data", "data.collect.num_episodes=300"),
            *("evaluation.every=0", "evaluation.num_episodes=1", "evaluation.num_actors=0", "checkpoint.every=0"),
            *("logging.every=25", "scaling.cpus_per_worker=1", f"total_timesteps={options.updates}"),
        ],
    )
    start_run(name_run(replace(base, name="data", total_timesteps=1), "data"))
    console = Console(width=110)
    measure_starts(base, folder, console)
    times = measure_updates(base, options.rounds)
    show(times, console)


def measure_starts(base: RunConfig, folder: Path, console: Console) -> None:
    """Seconds from the command to each stage of a run, alone and on a cluster that is there."""
    import ray

    table = Table("seconds from the command", "cold", "cluster there")
    cold = seconds_of_start(base, folder, "cold", {})
    ray.init(include_dashboard=False, log_to_driver=False)
    address = ray.get_runtime_context().gcs_address
    seconds_of_start(base, folder, "first", {"RAY_ADDRESS": address})
    warm = seconds_of_start(base, folder, "warm", {"RAY_ADDRESS": address})
    empty = [seconds_of_empty_trainer(folder, address) for _ in range(3)]
    ray.shutdown()
    for stage, seconds in cold.items():
        table.add_row(stage, f"{seconds:.1f}", f"{warm[stage]:.1f}" if stage in warm else "")
    console.print(table)
    console.print("a TorchTrainer that does nothing, cluster there: " + " ".join(f"{each:.1f}" for each in empty))


EMPTY_TRAINER = """
import sys, time
import ray, ray.train, ray.train.torch
folder = sys.argv[1]
ray.init(log_to_driver=False)
ray.train.torch.TorchTrainer(
    lambda: open(f"{folder}/empty", "w").write(str(time.time())),
    scaling_config=ray.train.ScalingConfig(num_workers=1),
    run_config=ray.train.RunConfig(name=str(time.time()), storage_path=f"{folder}/empty-runs"),
).fit()
"""


def seconds_of_empty_trainer(folder: Path, address: str) -> float:
    """From the command to the worker's function: Ray Train's own share of a start."""
    began = time.time()
    subprocess.run(
        [sys.executable, "-c", EMPTY_TRAINER, str(folder)],
        env=os.environ | {"RAY_ADDRESS": address},
        check=True,
        capture_output=True,
    )
    return float((folder / "empty").read_text()) - began


def seconds_of_start(base: RunConfig, folder: Path, name: str, environment: dict[str, str]) -> dict[str, float]:
    """The stages of one command, by what it logs and what the worker writes down."""
    overrides = ["--config=decision_transformer/pendulum", f"storage_path={base.storage_path}"]
    overrides += [f"data.path={base.data.path}", f"name={name}"]
    overrides += ["algorithm=scale:TimedLearner", "total_timesteps=20", "evaluation.num_episodes=1"]
    code = "import time; import dt_ray.jobs.training; import dt_ray.train as t; import sys; t.main(sys.argv[1:])"
    began = time.time()
    done = subprocess.Popen(
        [sys.executable, "-c", code, *overrides],
        env=os.environ | environment,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    stages = {}
    assert done.stderr is not None
    for line in done.stderr:
        if "data:" in line:
            stages["Ray is there, data found"] = time.time() - began
        if "training in" in line:
            stages["data laid out"] = time.time() - began
    assert done.wait() == 0, name
    for line in (Path(base.storage_path) / f"{name}.times").read_text().splitlines():
        stage, moment = line.split("\t")
        stages[stage] = float(moment) - began
    stages["command ended"] = time.time() - began
    return stages


def measure_updates(base: RunConfig, rounds: int) -> dict[tuple[int, int], list[float]]:
    """Seconds of an update by (workers, global batch), a figure a round; no workers are this process, without Ray."""
    import ray

    from dt_ray.distributed.cluster import LOCAL_SETTINGS, NO_DASHBOARD, SETTINGS, environment, quiet

    times: dict[tuple[int, int], list[float]] = {key: [] for key in ((0, BATCH), *FITTED, *UNSEEN)}
    with quiet(False), environment(SETTINGS | LOCAL_SETTINGS | NO_DASHBOARD):
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
        for number in range(rounds):
            for num_workers, batch in times:
                name = f"{num_workers}-{batch}-{number}"
                config = replace(
                    base,
                    name=name,
                    scaling=replace(base.scaling, num_workers=num_workers),
                    optim=replace(base.optim, batch_size=batch),
                )
                start_run(name_run(config, name))
                lines = (Path(base.storage_path) / name / "metrics.jsonl").read_text().splitlines()
                rates = [json.loads(line).get("time/updates_per_s") for line in lines[2:]]
                times[num_workers, batch].append(1 / float(np.median([rate for rate in rates if rate])))
        ray.shutdown()
    return times


def show(times: dict[tuple[int, int], list[float]], console: Console) -> None:
    medians = {key: float(np.median(each)) for key, each in times.items()}
    fitted = fit({key: medians[key] for key in FITTED})
    table = Table("workers", "global batch", "ms an update", "rounds", "model", "off by", "fitted")
    for (workers, batch), seconds in medians.items():
        spread = " ".join(f"{1000 * each:.1f}" for each in times[workers, batch])
        row = [str(workers), str(batch), f"{1000 * seconds:.2f}", spread]
        if workers:
            said = predict(fitted, workers, batch)
            row += [f"{1000 * said:.2f}", f"{said / seconds - 1:+.0%}", "yes" if (workers, batch) in FITTED else "no"]
        table.add_row(*row)
    console.print(table)
    overhead = np.median(np.array(times[0, BATCH]) / np.array(times[1, BATCH]))
    speed_up = np.median(np.array(times[1, BATCH]) / np.array(times[2, BATCH]))
    free = np.median(np.array(times[1, BATCH]) / np.array(times[1, BATCH // 2]))
    exchange = np.median(np.array(times[2, BATCH]) - np.array(times[1, BATCH // 2]))
    console.print(f"one Ray Train worker against no Ray: {overhead:.3f} of the updates/s (asked: 0.97)")
    console.print(f"two workers against one, global batch {BATCH}: {speed_up:.2f} x the windows/s (asked: 1.7)")
    console.print(f"the same if two workers neither exchanged anything nor slowed each other: {free:.2f} x")
    console.print(f"two workers and {BATCH} against one and {BATCH // 2}: {1000 * exchange:.2f} ms for the exchange")
    a, b, c = fitted
    console.print(f"t(n, B) = {1000 * a:.2f} ms + {1e6 * b:.1f} µs B/n + {1000 * c:.2f} ms [n > 1]", markup=False)


def fit(times: dict[tuple[int, int], float]) -> tuple[float, float, float]:
    """a, b, c by least squares of relative errors."""
    rows = np.array([(1.0, batch / workers, float(workers > 1)) for workers, batch in times])
    seconds = np.array(list(times.values()))
    found = np.linalg.lstsq(rows / seconds[:, None], np.ones(len(seconds)), rcond=None)[0]
    return float(found[0]), float(found[1]), float(found[2])


def predict(fitted: tuple[float, float, float], workers: int, batch: int) -> float:
    a, b, c = fitted
    return a + b * batch / workers + c * (workers > 1)


if __name__ == "__main__":
    main()

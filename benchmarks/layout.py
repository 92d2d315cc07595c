"""Peak memory while data is laid out for training, over the size of the table: by one process, and by Ray's tasks.

    python benchmarks/layout.py [--steps N] [--state S] [--action A] [--json FILE]

Files of random episodes are read, checked and laid out, in a process of its own for each way. The table is what
remains: S + A + 1 floats for each step. What the same takes on next to no data is not counted.

- one process: its peak resident memory.
- Ray's tasks: the largest peak of private memory of a process, and the peak of all processes together with the object
  store, where memory that they share counts once.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table
from work import watching

from dt_ray.config.loading import load_config
from dt_ray.config.schema import RunConfig
from dt_ray.data import TransitionDataset
from dt_ray.data.logs.episodes import to_table
from dt_ray.data.spaces import SpaceSpec

EPISODE_STEPS = 1000
EPISODES_A_FILE = 100
FEWEST_EPISODES = 4  # of next to no data
MB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4_000_000)
    parser.add_argument("--state", type=int, default=11, help="numbers of an observation")
    parser.add_argument("--action", type=int, default=3, help="numbers of an action")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--measure", nargs=2, metavar=("here|ray", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        way, folder = options.measure
        print(json.dumps((here if way == "here" else on_ray)(Path(folder), options.state, options.action)))
        return
    table_mb = options.steps * 4 * (options.state + options.action + 1) / MB
    figures = {"table, MB": table_mb}
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / "data", options.steps // EPISODE_STEPS, options.state, options.action)
        write(Path(folder) / "least", FEWEST_EPISODES, options.state, options.action)
        for way in ("here", "ray"):
            found, least = (measured(way, Path(folder) / name, options) for name in ("data", "least"))
            figures[f"{way}, seconds"] = found.pop("seconds")
            for name, peak in found.items():
                above = peak - least[name]
                figures |= {f"{name}, MB": above, f"{name} / table": above / table_mb}
    table = Table("what", "figure")
    for name, value in figures.items():
        table.add_row(name, f"{value:,.2f}")
    Console(width=120).print(table)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))


def write(folder: Path, num_episodes: int, state: int, action: int) -> None:
    folder.mkdir()
    generator = np.random.default_rng(0)
    for number, first in enumerate(range(0, num_episodes, EPISODES_A_FILE)):
        episodes = min(EPISODES_A_FILE, num_episodes - first)
        steps = episodes * EPISODE_STEPS
        data = TransitionDataset(
            observations=generator.standard_normal((steps, state), np.float32),
            actions=generator.uniform(-1, 1, (steps, action)).astype(np.float32),
            rewards=generator.standard_normal(steps, np.float32),
            starts=np.arange(episodes) * EPISODE_STEPS,
            episode_ids=np.arange(episodes) + first,
        )
        pq.write_table(to_table(data), folder / f"{number:05d}.parquet")


def measured(way: str, folder: Path, options: argparse.Namespace) -> dict[str, float]:
    command = [sys.executable, __file__, "--measure", way, str(folder)]
    command += ["--state", str(options.state), "--action", str(options.action)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def prepare(folder: Path, state: int, action: int) -> tuple[RunConfig, SpaceSpec]:
    base = load_config("decision_transformer/pendulum", ["data.collect=null", f"model.max_timesteps={EPISODE_STEPS}"])
    config = replace(base, data=replace(base.data, path=str(folder), residency="resident"))
    bounds = ((-1.0,) * action, (1.0,) * action)
    return config, SpaceSpec(observation_dim=state, action_dim=action, action_low=bounds[0], action_high=bounds[1])


def here(folder: Path, state: int, action: int) -> dict[str, float]:
    from dt_ray.training.preparing import prepare_here

    config, spec = prepare(folder, state, action)
    before, began = _kilobytes("/proc/self/status", "VmRSS:"), time.perf_counter()
    prepare_here(config, spec)
    took = time.perf_counter() - began
    return {"one process": (_kilobytes("/proc/self/status", "VmHWM:") - before) / 1024, "seconds": took}


def on_ray(folder: Path, state: int, action: int) -> dict[str, float]:
    from dt_ray.distributed.cluster import connection
    from dt_ray.distributed.preparing import prepare_data

    config, spec = prepare(folder, state, action)
    with connection(), peaks() as found:
        began = time.perf_counter()
        data = prepare_data(config, spec)
        found["seconds"] = time.perf_counter() - began
        del data
    return found


@contextmanager
def peaks() -> Iterator[dict[str, float]]:
    """Of Ray's processes here: the largest private memory of one, and what all take together."""
    found = {"a task of Ray's": 0.0, "all processes": 0.0}

    def look() -> None:
        total = 0
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError, IndexError):
                if b"ray::" in (process / "cmdline").read_bytes() or int(process.name) == own:
                    smaps = process / "smaps_rollup"
                    total += _kilobytes(smaps, "Pss:")
                    found["a task of Ray's"] = max(found["a task of Ray's"], _kilobytes(smaps, "Anonymous:") / 1024)
        found["all processes"] = max(found["all processes"], total / 1024)

    own = int(Path("/proc/self").resolve().name)
    with watching(look, every_s=0.05):
        yield found


def _kilobytes(file: str | Path, name: str) -> int:
    return int(Path(file).read_text().split(name)[1].split()[0])


if __name__ == "__main__":
    main()

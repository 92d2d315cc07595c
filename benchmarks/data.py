"""Windows a second out of memory and through it, memory over a run, and importing: each beside the bare minimum.

    python benchmarks/data.py [--steps N] [--memory-steps N] [--import-steps N] [--plot FILE] [--json FILE]

One thread. Sides that are compared take turns in one run; a ratio is the median over the rounds of ratios within one.

- resident: batches as a training worker gets them, against `view[anchors]` of one float array that has every window as
  a contiguous run, anchors drawn anew for each batch: nothing can be less.
- streaming: the same from files, against Ray Data's plain way, windows cut in `map_batches` and read by
  `iter_torch_batches`, with and without a local shuffle; and from blocks of shuffled episodes that Ray Data holds
  (`data.residency=dataset`), which one pass makes before the first update.
- memory: resident set size of a run on data ten times larger than `data.memory_mb`, beside one that holds it.
- start: preparing a run on 100 files on Ray, resident, and streaming for the first time and again.
- one file: peak memory of a process that reads the episodes of one HDF5, NPZ or CSV file part by part, over its size.
- import: `python -m dt_ray.data import`, against pyarrow reading the same files and writing them again.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import torch
from ours import SPEC, configure, make_dataset
from rich.console import Console
from rich.table import Table
from work import ACTION, CONTEXT, EPISODE_STEPS, STATE, Measure, rate, watching

from dt_ray.config.schema import DataConfig, EvaluationConfig, ModelConfig, OptimConfig, RunConfig, ScalingConfig
from dt_ray.data import slice_windows
from dt_ray.data.logs.datasets import read_parts
from dt_ray.data.logs.episodes import from_table, to_table
from dt_ray.data.logs.files import find_files
from dt_ray.jobs.training import name_run, start_run
from dt_ray.play.collection import flatten
from dt_ray.training.file_facts import FileFacts
from dt_ray.training.resident import BatchSource, ResidentData, ResidentSource
from dt_ray.training.sharded import ShardedData, ShardedSource
from dt_ray.training.stream_facts import StreamingData
from dt_ray.training.streaming import StreamingSource

BATCH, ROUNDS = 256, 5
EPISODES_A_FILE = 20
NUM_FILES, START_ROUNDS = 100, 3  # of measuring starts
START_SETTINGS = {"discount": 0.99, "validation_fraction": 0.05}  # a discount needs bounds of returns-to-go
ROW_BYTES = 4 * (STATE + ACTION + 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1_000_000, help="transitions of the datasets")
    parser.add_argument("--import-steps", type=int, default=10_000_000)
    parser.add_argument("--start-steps", type=int, default=10_000_000)
    parser.add_argument("--file-steps", type=int, default=3_000_000)
    parser.add_argument("--memory-steps", type=int, default=4_000_000)
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the memory of the runs (PNG)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    torch.set_num_threads(1)
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        config = write(Path(folder), options.steps)
        figures |= resident(config, options.steps)
        figures |= streaming(config, options.steps)
    with tempfile.TemporaryDirectory() as folder:
        steps = options.memory_steps
        figures |= memory(write(Path(folder), steps), steps, options.plot)
    with tempfile.TemporaryDirectory() as folder:
        figures |= starting(write(Path(folder), options.start_steps, num_files=NUM_FILES), Path(folder))
    with tempfile.TemporaryDirectory() as folder:
        figures |= one_file(Path(folder), options.file_steps)
    with tempfile.TemporaryDirectory() as folder:
        figures |= importing(Path(folder), options.import_steps)
    table = Table("what", "figure")
    for name, value in figures.items():
        table.add_row(name, f"{value:,.2f}")
    Console(width=120).print(table)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))


def write(folder: Path, steps: int, *, num_files: int | None = None) -> RunConfig:
    """Files of whole episodes, and the configuration that reads them."""
    episodes = to_table(make_dataset(steps // EPISODE_STEPS))
    (folder / "data").mkdir()
    num = EPISODES_A_FILE if num_files is None else -(-len(episodes) // num_files)
    for i, begin in enumerate(range(0, len(episodes), num)):
        pq.write_table(episodes.slice(begin, num), folder / f"data/{i:05d}.parquet")
    config = configure()
    data, optim = replace(config.data, path=str(folder / "data")), replace(config.optim, batch_size=BATCH)
    return replace(config, data=data, optim=optim, model=replace(config.model, max_timesteps=EPISODE_STEPS))


def resident(config: RunConfig, steps: int) -> dict[str, float]:
    episodes = make_dataset(steps // EPISODE_STEPS)
    source = ResidentSource(ResidentData.build(episodes, SPEC, config), config)
    padded = np.zeros((steps + CONTEXT, STATE + ACTION + 3), np.float32)  # and return-to-go, timestep and mask
    padded[:steps, :STATE] = episodes.observations
    view = np.lib.stride_tricks.sliding_window_view(padded, CONTEXT, axis=0).swapaxes(1, 2)
    generator = np.random.default_rng(0)
    found = rounds(
        {
            "resident, windows/s": batches(source, 2000),
            "bare gather, windows/s": lambda: rate(
                BATCH * 2000, lambda: [view[generator.integers(steps, size=BATCH)] for _ in range(2000)]
            ),
        }
    )
    return medians(found) | {"resident / bare gather (at least 0.5)": ratio(found)}


def streaming(config: RunConfig, steps: int) -> dict[str, float]:
    """A pass over the data, twice; Ray Data's first one, in which processes start, is not timed."""
    import ray
    import ray.data

    from dt_ray.distributed.cluster import connection

    config = replace(config, data=replace(config.data, residency="streaming", memory_mb=steps * ROW_BYTES // 2**20))
    source = StreamingSource(stream_data(config), config)

    def cut(table: pa.Table) -> dict[str, np.ndarray]:
        data = from_table(table, source="")
        return asdict(slice_windows(data, np.arange(data.num_transitions), length=CONTEXT))

    def plain(shuffle: int | None) -> Measure:
        def measure() -> float:
            windows = ray.data.read_parquet(config.data.path).map_batches(cut, batch_format="pyarrow", batch_size=None)

            def read() -> None:
                for _ in windows.iter_torch_batches(batch_size=BATCH, local_shuffle_buffer_size=shuffle):
                    pass

            return rate(steps, read)

        return measure

    with connection():
        ray.data.DataContext.get_current().enable_progress_bars = False
        held_by_ray(config)  # processes start
        shards, took = held_by_ray(config)
        found = rounds(
            {
                "streaming, windows/s": batches(source, steps // BATCH),
                "dataset, windows/s": batches(shards, steps // BATCH),
                "map_batches, no shuffle, windows/s": plain(None),
                "map_batches, local shuffle, windows/s": plain(10_000),
            },
            num=2,
        )
    figures = medians(found) | {"dataset, transitions/s into blocks": steps / took}
    plain_way = found["map_batches, local shuffle, windows/s"]
    for name in ("streaming", "dataset"):
        pair = {"ours": found[f"{name}, windows/s"], "plain": plain_way}
        figures[f"{name} / map_batches with local shuffle (at least 5)"] = ratio(pair)
    return figures


def held_by_ray(config: RunConfig) -> tuple[ShardedSource, float]:
    """The source of `data.residency=dataset` in this process, and the seconds that its blocks took."""
    import ray

    from dt_ray.distributed.preparing import prepare_data

    config = replace(config, data=replace(config.data, residency="dataset"), scaling=ScalingConfig(num_workers=1))
    began = time.perf_counter()
    shared = prepare_data(config, SPEC)
    took = time.perf_counter() - began
    refs: list[Any] = [ref for shard in shared.shards for ref in shard.to_arrow_refs()]
    data = shared.fetch()
    assert isinstance(data, ShardedData)
    return ShardedSource(data, config, lambda blocks: ray.get([refs[at] for at in blocks])), took


def starting(config: RunConfig, folder: Path) -> dict[str, float]:
    """Seconds from files to data that workers can train on, by Ray's tasks on a cluster that is there."""
    from dt_ray.distributed.cluster import connection
    from dt_ray.distributed.preparing import prepare_data

    config = replace(config, env_id=None, scaling=replace(config.scaling, num_workers=1))
    found: dict[str, list[float]] = {"resident": [], "streaming, first": [], "streaming, again": []}
    with connection():
        for number in range(START_ROUNDS + 1):  # in the first round processes start
            for name, seconds in found.items():
                residency = "resident" if name == "resident" else "streaming"
                settings = replace(config.data, residency=residency, **START_SETTINGS)
                run = replace(config, data=settings, storage_path=str(folder / f"runs-{number}"))
                began = time.perf_counter()
                data = prepare_data(run, SPEC)
                seconds += [time.perf_counter() - began] if number else []
                del data
    return {f"start, {name}, s": value for name, value in medians(found).items()}


def one_file(folder: Path, steps: int) -> dict[str, float]:
    """One file in each format, in D4RL's arrangement, and next to nothing in it, whose reading is not counted."""
    figures: dict[str, float] = {}
    for name, write_rows in {"HDF5": write_hdf5, "NPZ": write_npz, "CSV": write_csv}.items():
        peaks: list[float] = []
        for num in (EPISODE_STEPS, steps):
            place = folder / f"{name}-{num}"
            place.mkdir()
            file = write_rows(place / "log", num)
            command = [sys.executable, __file__, "--read", str(file)]
            found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
            peaks.append(found["peak"])
            size, seconds = file.stat().st_size / 2**20, found["seconds"]
            file.unlink()
        above = peaks[1] - peaks[0]
        figures |= {f"{name}, MB": size, f"{name}, peak, MB": above, f"{name}, peak / file": above / size}
        figures[f"{name}, MB/s"] = size / seconds
    return figures


def columns_of_file(steps: int) -> dict[str, np.ndarray]:
    episodes = make_dataset(steps // EPISODE_STEPS)
    ends = np.zeros(episodes.num_transitions, bool)
    ends[episodes.ends - 1] = True
    return {
        "observations": episodes.observations,
        "actions": episodes.actions,
        "rewards": episodes.rewards,
        "terminals": np.zeros_like(ends),
        "timeouts": ends,
        "next_observations": np.roll(episodes.observations, -1, axis=0),
    }


def write_hdf5(file: Path, steps: int) -> Path:
    import h5py

    with h5py.File(file.with_suffix(".hdf5"), "w") as content:
        for name, values in columns_of_file(steps).items():
            content[name] = values
    return file.with_suffix(".hdf5")


def write_npz(file: Path, steps: int) -> Path:
    np.savez(file.with_suffix(".npz"), **columns_of_file(steps))  # type: ignore[arg-type]
    return file.with_suffix(".npz")


def write_csv(file: Path, steps: int) -> Path:
    columns: dict[str, np.ndarray] = {}
    for name, values in columns_of_file(steps).items():
        columns |= {f"{name}_{i}": each for i, each in enumerate(values.T)} if values.ndim == 2 else {name: values}
    pyarrow.csv.write_csv(pa.table(columns), file.with_suffix(".csv"))
    return file.with_suffix(".csv")


def read(path: str) -> None:
    """Reads all episodes in this process, part by part, and prints its peak memory above the start's and the time."""
    before, began = resident_set(), time.perf_counter()
    steps = sum(part.num_transitions for part in read_parts(DataConfig(path=path)))
    seconds = time.perf_counter() - began
    assert steps
    peak = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024
    print(json.dumps({"peak": peak - before, "seconds": seconds}))


def memory(config: RunConfig, steps: int, plot: Path | None) -> dict[str, float]:
    """Resident set size of a process of its own that trains for two passes, streaming or with the data resident."""
    megabytes = max(1, steps * ROW_BYTES // 2**20 // 10)
    curves = {}
    for residency in ("streaming", "resident"):
        command = [sys.executable, __file__, "--train", config.data.path, str(megabytes), residency]
        command.append(str(2 * steps // BATCH))
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        curves[residency] = np.array(json.loads(output))
    if plot:
        draw(curves, plot, title=f"{steps / 1e6:g} M transitions, data.memory_mb={megabytes}")
    data = steps * ROW_BYTES / 2**20
    figures = {"data, MB": data, "data.memory_mb": float(megabytes)}
    for name, curve in curves.items():
        parts = np.array_split(curve, 4)
        figures |= {f"{name} run, quarter {i + 1}, MB": float(part.max()) for i, part in enumerate(parts)}
    return figures


def train(path: str, megabytes: int, residency: Literal["streaming", "resident"], num_updates: int) -> None:
    """Trains a small model in this process; prints the resident set size on the way, in MB above the start's."""
    config = replace(
        configure(),
        env_id="memory:OneStep-v0",
        total_timesteps=num_updates,
        scaling=ScalingConfig(num_workers=0),
        storage_path=tempfile.mkdtemp(dir=Path(path).parent),
        data=DataConfig(path=path, residency=residency, memory_mb=megabytes, validation_fraction=0.0),
        model=ModelConfig(context_length=CONTEXT, num_layers=1, width=16, max_timesteps=EPISODE_STEPS),
        optim=OptimConfig(batch_size=BATCH),
        evaluation=EvaluationConfig(target_returns=(0.0,), num_episodes=1, max_timesteps=1),
    )
    torch.set_num_threads(1)
    before, curve = resident_set(), []
    with watching(lambda: curve.append(resident_set() - before), every_s=0.2):
        start_run(name_run(config, "memory"))
    print(json.dumps(curve))


def draw(curves: dict[str, np.ndarray], file: Path, *, title: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.add_subplot()
    for (name, curve), color in zip(curves.items(), ("#0072B2", "#D55E00"), strict=True):
        axes.plot(np.linspace(0, 2, len(curve)), curve, color=color, label=f"data.residency={name}")
    axes.set_xlabel("passes over the data (the first points: reading it)")
    axes.set_ylabel("resident memory above the start's (MB)")
    axes.set_title(title)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.savefig(file, dpi=150)


def resident_set() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def importing(folder: Path, steps: int) -> dict[str, float]:
    """Flat files without order, as logs come; what pyarrow alone takes to read and write the same bytes."""
    (folder / "flat").mkdir()
    rows = 0
    for i in range(10):
        part = make_dataset(max(1, steps // 10 // EPISODE_STEPS))
        table = flatten(to_table(part))
        ids = pa.array(table["episode_id"].to_numpy() + i * part.num_episodes)
        pq.write_table(table.set_column(0, "episode_id", ids), folder / f"flat/{i}.parquet")
        rows += len(table)
    size = sum(file.stat().st_size for file in (folder / "flat").iterdir()) / 2**20

    def copy() -> None:
        (folder / "copy").mkdir(exist_ok=True)
        for file in sorted((folder / "flat").iterdir()):
            pq.write_table(pq.read_table(file), folder / "copy" / file.name)

    command = [sys.executable, "-m", "dt_ray.data", "import", str(folder / "flat"), "--out", str(folder / "packed")]
    with peak_of_tree() as peak:
        began = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        took = time.perf_counter() - began
    plain = 1 / rate(1, copy)
    return {
        "import, transitions": rows,
        "import, MB/s": size / took,
        "pyarrow read and write, MB/s": size / plain,
        "import / pyarrow": plain / took,
        "import, peak of all its processes, MB": peak[0],
        "import, data as float32, MB": rows * ROW_BYTES / 2**20,
    }


@contextmanager
def peak_of_tree():
    """The largest sum over Ray's processes and the command of what each holds alone, in MB."""
    peak = [0.0]

    def look() -> None:
        total = 0
        for place in Path("/proc").glob("[0-9]*"):
            with suppress(OSError, IndexError):
                line = (place / "cmdline").read_bytes()
                if b"ray::" in line or b"dt_ray.data" in line:
                    total += int((place / "smaps_rollup").read_text().split("Pss:")[1].split()[0])
        peak[0] = max(peak[0], total / 1024)

    with watching(look, every_s=0.1):
        yield peak


def stream_data(config: RunConfig) -> StreamingData:
    files = find_files(config.data.path)
    return StreamingData.build(files, FileFacts(config, SPEC))


def batches(source: BatchSource, count: int) -> Measure:
    steps = iter(range(10**9))
    return lambda: rate(BATCH * count, lambda: [source.batch(next(steps)) for _ in range(count)] and None)


def rounds(measures: dict[str, Callable[[], float]], *, num: int = ROUNDS) -> dict[str, list[float]]:
    """Each measure once a round, in turns; a round before them is not counted."""
    for measure in measures.values():
        measure()
    found: dict[str, list[float]] = {name: [] for name in measures}
    for _ in range(num):
        for name, measure in measures.items():
            found[name].append(measure())
    return found


def medians(found: dict[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in found.items()}


def ratio(found: dict[str, list[float]]) -> float:
    """The first over the second, within a round."""
    first, second = found.values()
    return statistics.median(one / other for one, other in zip(first, second, strict=True))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--read"]:
        read(sys.argv[2])
    elif sys.argv[1:2] == ["--train"]:
        train(
            sys.argv[2], int(sys.argv[3]), "streaming" if sys.argv[4] == "streaming" else "resident", int(sys.argv[5])
        )
    else:
        main()

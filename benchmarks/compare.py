"""dt_ray beside the public implementations and beside this machine's limits, measured in turns in one run.

    make bench                                     # once: .venv-bench with d3rlpy, transformers and torchrl
    .venv-bench/bin/python benchmarks/compare.py [--quick] [--threads N] [--rounds N] [--json FILE]

Work: state 11, action 3, context 20, batch 64, 3 layers, 1 head, width 128, dropout 0.1, relu; Pendulum-v1 with context
20 for evaluation. Everyone has a process of their own with the same number of threads, and only one works at a time. A
ratio is the median over rounds of ratios taken within a round. Writes docs/performance.md, unless it is --quick.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import platform
import statistics
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

PEERS = ("d3rlpy", "transformers", "torchrl")
SUBJECTS = {"dt_ray": "ours:OURS", "machine": "machine:MACHINE"} | {peer: f"peers:{peer.upper()}" for peer in PEERS}
REPORT = Path(__file__).parents[1] / "docs" / "performance.md"

HEADER = """\
# Performance

Written by `{command}` on {date}: {machine}, {threads} thread(s), {packages}.
dt_ray beside the public implementations and beside this machine's limits, measured in turns in one run; a ratio is the
median over the rounds of ratios taken within a round. Absolute figures are this machine's on that day.

Work: state 11, action 3, context 20, batch 64, 3 layers, 1 head, width 128, dropout 0.1, relu; Pendulum-v1 with context
20 for evaluation, at one thread. torchrl has no timesteps and no mask, transformers pads on the left, d3rlpy masks.

| what | against | at least | measured | lowest .. highest round |
|---|---|---|---|---|"""

Rounds = dict[tuple[str, str], list[float]]  # (subject, measure) -> one figure a round


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What is compared with what: the best of `rivals` in each round, or ours in another way."""

    what: str
    ours: str
    rivals: tuple[tuple[str, str], ...]
    against: str
    at_least: float


def of_peers(measure: str) -> tuple[tuple[str, str], ...]:
    return tuple((peer, measure) for peer in PEERS)


BATCHED = (("torchrl", "evaluation, 10 environments"), ("torchrl", "evaluation, 100 environments"))
CLAIMS = (
    Claim(
        what="update, triplet layout, same mathematics",
        ours="update, triplet",
        rivals=of_peers("update"),
        against="fastest public one",
        at_least=1.3,
    ),
    Claim(
        what="update, step layout",
        ours="update, step",
        rivals=of_peers("update"),
        against="fastest public one",
        at_least=3.5,
    ),
    Claim(
        what="share of the matrix rate in an update, step layout",
        ours="update, step",
        rivals=(("machine", "matrix products of an update, step"),),
        against="its matrix products alone",
        at_least=0.7,
    ),
    Claim(
        what="share of the matrix rate in an update, triplet layout",
        ours="update, triplet",
        rivals=(("machine", "matrix products of an update, triplet"),),
        against="its matrix products alone",
        at_least=0.7,
    ),
    Claim(
        what="batches from memory",
        ours="batches",
        rivals=of_peers("batches"),
        against="fastest public one",
        at_least=25,
    ),
    Claim(
        what="evaluation, 100 episodes, context recomputed",
        ours="evaluation, 100 episodes",
        rivals=of_peers("evaluation, one environment"),
        against="fastest of one environment",
        at_least=8,
    ),
    Claim(
        what="the same",
        ours="evaluation, 100 episodes",
        rivals=BATCHED,
        against="fastest batched one",
        at_least=4,
    ),
    Claim(
        what="the same, band attention and its exact cache",
        ours="evaluation, 100 episodes, band and cache",
        rivals=BATCHED,
        against="fastest batched one",
        at_least=25,
    ),
    Claim(
        what="evaluation of 8 targets x 12 episodes",
        ours="evaluation, 8 targets x 12",
        rivals=(("dt_ray", "evaluation, 1 target x 96"),),
        against="1 target x 96, ours",
        at_least=1 / 1.1,
    ),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round and no report: does everything run?")
    parser.add_argument("--threads", type=int, default=1, help="of everyone, in training; evaluation always has one")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    missing = [peer for peer in PEERS if find_spec(peer) is None]
    if missing:
        Console(stderr=True).print(f"not installed, so not compared: {', '.join(missing)}; `make bench` installs them")
    subjects = {name: place for name, place in SUBJECTS.items() if name not in missing}
    rounds = measure_in_turns(subjects, num_rounds=1 if options.quick else options.rounds, threads=options.threads)
    lines = report(rounds, options.threads)
    Console(width=140).print("\n".join(lines), markup=False)
    if options.json:
        figures = [{"subject": who, "measure": what, "rounds": values} for (who, what), values in rounds.items()]
        Path(options.json).write_text(json.dumps({"threads": options.threads, "figures": figures}, indent=1) + "\n")
    if not options.quick and not missing:
        REPORT.write_text("\n".join(lines) + "\n")


def measure_in_turns(subjects: dict[str, str], *, num_rounds: int, threads: int) -> Rounds:
    rounds: Rounds = {}
    with ExitStack() as stack:
        processes = {name: stack.enter_context(subject_process(place)) for name, place in subjects.items()}
        turns = [(name, measure) for name, process in processes.items() for measure in process.recv()]
        turns.sort(key=lambda turn: turn[1])  # what is compared is measured close together
        for _ in track(range(num_rounds), description="rounds", console=Console(stderr=True)):
            for name, measure in turns:
                processes[name].send((measure, 1 if measure.startswith("evaluation") else threads))
                figure = processes[name].recv()
                if isinstance(figure, BaseException):
                    raise figure
                rounds.setdefault((name, measure), []).append(figure)
    return rounds


@contextmanager
def subject_process(place: str) -> Iterator[Connection]:
    """A process that answers (measure, threads) with a figure, having first sent the names of its measures."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=answer, args=(place, there), daemon=True)
    process.start()
    try:
        yield here
    finally:
        here.send(None)
        process.join()


def answer(place: str, connection: Connection) -> None:
    import torch

    module, name = place.split(":")
    builders: dict[str, Any] = getattr(importlib.import_module(module), name)
    measures: dict[str, Any] = {}
    connection.send(list(builders))
    while (request := connection.recv()) is not None:
        measure, threads = request
        torch.set_num_threads(threads)
        try:
            if measure not in measures:
                measures[measure] = builders[measure]()
            connection.send(measures[measure]())
        except Exception as error:
            connection.send(RuntimeError(f"{place}, {measure}: {error!r}"))


def report(rounds: Rounds, threads: int) -> list[str]:
    num_rounds = len(next(iter(rounds.values())))
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", *PEERS) if find_spec(name) is not None)
    command = f"python benchmarks/compare.py --threads {threads} --rounds {num_rounds}"
    lines = HEADER.format(command=command, date=date.today(), machine=cpu_name(), threads=threads, packages=packages)
    lines = lines.splitlines()
    for claim in CLAIMS:
        rivals = [rival for rival in claim.rivals if rival in rounds]
        if not rivals:
            continue
        ratios = [
            ours / max(rounds[rival][i] for rival in rivals) for i, ours in enumerate(rounds["dt_ray", claim.ours])
        ]
        middle = statistics.median(ratios)
        verdict = f"**{middle:.2f} x**" if middle >= claim.at_least else f"{middle:.2f} x, short"
        spread = f"{min(ratios):.2f} .. {max(ratios):.2f}"
        lines.append(f"| {claim.what} | {claim.against} | {claim.at_least:.2g} x | {verdict} | {spread} |")
    lines += ["", "Everything measured, a second (median of the rounds):", "", "| | " + " | ".join(SUBJECTS) + " |"]
    lines.append("|---" * (1 + len(SUBJECTS)) + "|")
    for measure in sorted({measure for _, measure in rounds}):
        figures = [rounds.get((name, measure)) for name in SUBJECTS]
        cells = [f"{statistics.median(values):,.1f}" if values else "" for values in figures]
        lines.append(f"| {measure} | " + " | ".join(cells) + " |")
    return lines


def cpu_name() -> str:
    """The processor's model, where the system says."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()


if __name__ == "__main__":
    main()

"""Real runs that lose processes, nodes and storage at random moments, and what they come to.

`benchmarks/faults.py` runs the campaign and draws its table.
"""

from __future__ import annotations

import itertools
import json
import random
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from dt_ray.play.collection import CollectionPlan, collect_here, write_dataset
from dt_ray.runs.folder import RunFolder
from dt_ray.runs.storage import Folder
from support.faults import KINDS, SETTINGS, Kind, Run, damage, wait_for_the_end_of_ray
from support.object_store import ObjectStore
from support.processes import WAIT_S, mark_processes


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """What a run came to."""

    weights: dict[str, np.ndarray]
    losses: dict[int, float]
    targets: list[Any]
    workers: list[int]

    @classmethod
    def of(cls, run: RunFolder) -> Numbers:
        lines = [json.loads(line) for line in run.metrics_file.read_text().splitlines()]
        weights = (run.checkpoint(lines[-1]["step"]) / "policy/model.safetensors").read_bytes()
        assert [line["step"] for line in lines] == list(range(10, lines[-1]["step"] + 1, 10)), "a step is missing"
        return cls(
            weights=safetensors.numpy.load(weights),
            losses={line["step"]: line["train/loss"] for line in lines},
            targets=[report.targets for report in run.read_evaluations()],
            workers=[key for key, _ in itertools.groupby(lines, lambda line: line["time/workers"])],
        )


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A disturbed run beside the undisturbed one."""

    kind: str
    finished: bool
    lost: list[int]
    difference: float = float("nan")  # the largest of a parameter
    same_losses: bool = False
    same_evaluations: bool = False
    workers: list[int] = field(default_factory=list)
    wall_s: float = 0.0


class Campaign:
    """Runs in a folder of their own, on one dataset."""

    def __init__(self, folder: Path, seed: int, store: ObjectStore, *, ends_within_s: float = WAIT_S) -> None:
        self.folder, self.seed, self.store, self.ends_within_s = folder, seed, store, ends_within_s
        mark_processes()
        self.undisturbed: dict[tuple[str, ...], Numbers] = {}
        self.data = folder / "data"
        self._collect()

    def _collect(self) -> None:
        plan = CollectionPlan(env_id="Pendulum-v1", behavior="mixed", num_episodes=300, seed=100_000, max_timesteps=200)
        write_dataset(str(self.data), collect_here(plan), source=plan.source)
        shutil.copytree(self.data, self.folder / "rest")
        next((self.folder / "rest").glob("*.parquet")).unlink()

    def run(self, kind: str, number: int, *, comparing: bool = True) -> Outcome:
        """One disturbed run, and what it came to beside the undisturbed one."""
        chance = random.Random(f"{self.seed} {kind} {number}")
        entry, began = KINDS[kind], time.monotonic()
        run = self._prepare(f"{kind}-{number}".replace(" ", "-"), entry)
        if kind == "data":
            data = self.folder / f"damaged-{number}"
            shutil.copytree(self.data, data)
            (damaged,) = {file.name for file in data.iterdir()} - {
                file.name for file in (self.folder / "rest").iterdir()
            }
            damage(data / damaged, chance)
            run.command.append(f"data.path={data}")
        try:
            run.start()
            entry.disturb(run, chance)
            if run.wait() != 0:
                return Outcome(kind=kind, finished=False, lost=run.lost)
            ours = Numbers.of(run.folder)
            reference = self._reference(entry) if comparing else ours
            assert any(run.lost) or b"went back" not in run.log.read_bytes(), run.log
        finally:
            self._clean_up(run)
        return Outcome(
            kind=kind,
            finished=True,
            lost=run.lost,
            difference=max(
                float(np.abs(ours.weights[name] - value).max()) for name, value in reference.weights.items()
            ),
            same_losses=ours.losses == reference.losses,
            same_evaluations=ours.targets == reference.targets,
            workers=ours.workers,
            wall_s=time.monotonic() - began,
        )

    def _reference(self, entry: Kind) -> Numbers:
        """The undisturbed run, on a disk and with as many workers."""
        settings = tuple(each for each in entry.settings if "[" not in each and "resize" not in each)
        if settings not in self.undisturbed:
            plain = Kind(what="", disturb=entry.disturb, times=1, settings=settings)
            run = self._prepare(f"undisturbed-{len(self.undisturbed)}", plain)
            if "data.on_corrupt=skip" in settings:
                run.command.append(f"data.path={self.folder / 'rest'}")
            run.start()
            assert run.wait() == 0, run.log.read_text()
            self.undisturbed[settings] = Numbers.of(run.folder)
        return self.undisturbed[settings]

    def _prepare(self, name: str, entry: Kind) -> Run:
        storage = "s3://bucket/runs" if entry.storage == "object store" else f"{self.folder}/runs"
        command = [*SETTINGS, f"name={name}", f"storage_path={storage}", f"data.path={self.data}", *entry.settings]
        nodes = None
        if entry.num_nodes:
            from ray.cluster_utils import Cluster

            nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
            for _ in range(entry.num_nodes - 1):
                nodes.add_node(num_cpus=1)
        folder = RunFolder(Folder.at(storage) / name)
        return Run(
            folder=folder,
            command=command,
            log=self.folder / f"{name}.log",
            store=self.store,
            ends_within_s=self.ends_within_s,
            nodes=nodes,
        )

    def _clean_up(self, run: Run) -> None:
        self.store.mend()
        if run.process is not None and run.process.poll() is None:
            run.process.kill()
            run.process.wait()
        if run.nodes is not None:
            run.nodes.shutdown()
        wait_for_the_end_of_ray()

"""Real runs that lose processes, nodes and storage at random moments, and what they come to.

`benchmarks/faults.py` runs the campaign and draws its table.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors.numpy

from dt_ray.play.collection import CollectionPlan, collect_here, write_dataset
from dt_ray.runs.folder import RunFolder
from dt_ray.runs.storage import Folder
from support.object_store import ObjectStore

NUM_UPDATES = 2000
SETTINGS = [
    "--config=decision_transformer/pendulum",
    f"total_timesteps={NUM_UPDATES}",
    "data.collect=null",
    "data.validation_fraction=0.1",
    "model={context_length: 10, num_layers: 2, width: 32, num_heads: 2, max_timesteps: 200}",
    "optim={batch_size: 32, warmup_steps: 100}",
    "evaluation={num_episodes: 4, every: 1000, num_actors: 1, max_timesteps: 100, target_returns: [-200, -600]}",
    "checkpoint={every: 250, keep: 2}",
    "logging.every=10",
]
ENDS_WITHIN_S = 30  # a run that can't go on, and one that is refused once it is connected


MARK = "DT_RAY_FAULTS"  # in the environment of everything that a campaign starts


@dataclass
class Run:
    """A training command under way, and what was done to it."""

    folder: RunFolder
    command: list[str]
    log: Path
    store: ObjectStore
    nodes: Any = None  # a Ray cluster of several nodes, for the faults that are about them
    launcher: tuple[str, ...] = ("-m", "dt_ray.train")
    process: subprocess.Popen[bytes] | None = None
    lost: list[int] = field(default_factory=list)  # updates to be made again, a fault

    def start(self, *arguments: str) -> None:
        command = [sys.executable, *self.launcher, *(arguments or self.command)]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=self.environment)

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, **({"RAY_ADDRESS": self.nodes.address} if self.nodes else {})}

    def wait_for_refusal(self, process: subprocess.Popen[bytes], log: Path, message: str) -> None:
        """A command ends by itself, with exit code 2 and one message."""
        status = process.wait(timeout=ENDS_WITHIN_S)
        said = log.read_text()
        assert (status, message in said, "Traceback" in said) == (2, True, False), f"exit code {status}: {said[-2000:]}"

    def wait(self) -> int:
        assert self.process is not None
        return self.process.wait(timeout=400)

    def step(self) -> int:
        """The last logged update."""
        try:
            lines = self.folder.metrics_file.read_text().splitlines()
        except FileNotFoundError:
            return 0
        return json.loads(lines[-1])["step"] if lines and lines[-1].endswith("}") else 0

    def newest_checkpoint(self) -> int:
        newest = self.folder.latest_checkpoint()[0]
        return int(newest.name.removeprefix("step-")) if newest else 0

    def wait_for_step(self, step: int) -> None:
        assert self.process is not None
        while self.step() < step and self.process.poll() is None:
            time.sleep(0.02)

    def note_fault(self) -> None:
        """Counts a fault now, and the logged updates that no complete checkpoint has."""
        step = self.step()
        self.lost.append(max(0, step - self.newest_checkpoint()))

    def resume(self) -> None:
        """Goes on once Ray's processes have noticed that their driver is gone."""
        while ray_processes():
            time.sleep(0.2)
        self.start("--resume", str(self.folder))


Fault = Callable[[Run, random.Random], None]


def lose(process: str) -> Fault:
    """Kills a process of the run, by its name in Ray, twice while the run trains."""

    def disturb(run: Run, chance: random.Random) -> None:
        for moment in sorted(chance.randrange(20, NUM_UPDATES - 200) for _ in range(2)):
            run.wait_for_step(moment)
            run.note_fault()
            kill(process)

    return disturb


def lose_data_task(run: Run, chance: random.Random) -> None:
    """Kills what reads the data, or lays it out, when it is seen."""
    assert run.process is not None
    wanted = chance.choice(["MapBatches(read)", "_lay_out"])
    while not kill(wanted):
        assert run.process.poll() is None, f"no {wanted} was seen"
    run.note_fault()


def end_driver(number: signal.Signals) -> Fault:
    """Signals the command itself, then goes on by its resume command."""

    def disturb(run: Run, chance: random.Random) -> None:
        assert run.process is not None
        run.wait_for_step(chance.randrange(20, NUM_UPDATES - 200))
        run.process.send_signal(number)
        run.wait()
        run.note_fault()
        run.resume() if run.newest_checkpoint() else run.start(*run.command, "--overwrite")

    return disturb


def damage_checkpoint(run: Run, chance: random.Random) -> None:
    """Ends the driver and damages the newest checkpoint before the run is resumed."""
    assert run.process is not None
    run.wait_for_step(chance.randrange(520, NUM_UPDATES - 200))
    run.process.kill()
    run.wait()
    newest = Path(str(run.folder.checkpoint(run.newest_checkpoint())))
    damage(chance.choice(sorted(path for path in newest.rglob("*") if path.is_file())), chance)
    run.note_fault()
    run.resume()


def damage_data(run: Run, chance: random.Random) -> None:
    """Nothing while it trains: the data was damaged before."""
    run.lost.append(0)


def damage(file: Path, chance: random.Random) -> None:
    """Loses a file, or its end, or turns one bit of it."""
    content = bytearray(file.read_bytes())
    place = chance.randrange(len(content))
    kind = chance.choice(["missing", "cut", "turned"])
    if kind == "missing" and file.suffix != ".parquet":
        file.unlink()
    elif kind == "turned":
        content[place] ^= 1 << chance.randrange(8)
        file.write_bytes(content)
    else:
        file.write_bytes(content[:place])


def stop_store(run: Run, chance: random.Random) -> None:
    """The object store answers 500 or drops connections, for some seconds, twice."""
    for moment in sorted(chance.randrange(20, NUM_UPDATES - 200) for _ in range(2)):
        run.wait_for_step(moment)
        run.lost.append(0)
        run.store.fail(chance.choice(["500", "drop"]))
        time.sleep(chance.uniform(3, 15))
        run.store.mend()


def lose_node(*, away_s: tuple[float, float]) -> Fault:
    """Kills a node with everything on it; another one comes some seconds later."""

    def disturb(run: Run, chance: random.Random) -> None:
        run.wait_for_step(chance.randrange(20, NUM_UPDATES))
        run.note_fault()
        run.nodes.remove_node(run.nodes.worker_nodes.copy().pop(), allow_graceful=False)
        time.sleep(chance.uniform(*away_s))
        run.nodes.add_node(num_cpus=1)

    return disturb


def preempt_node(run: Run, chance: random.Random) -> None:
    """Gives notice of 20 seconds, then kills the node; another one comes later."""
    run.wait_for_step(chance.randrange(20, NUM_UPDATES))
    node = run.nodes.worker_nodes.copy().pop()
    notice = ["drain-node", "--address", run.nodes.address, "--node-id", node.node_id, "--reason-message", "spot"]
    notice += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--deadline-remaining-seconds", "20"]
    subprocess.run([Path(sys.executable).parent / "ray", *notice], check=True, capture_output=True)
    time.sleep(20)
    run.note_fault()
    run.nodes.remove_node(node, allow_graceful=False)
    time.sleep(chance.uniform(2, 10))
    run.nodes.add_node(num_cpus=1)


def fill_disk(run: Run, chance: random.Random) -> None:
    """Rank 0's disk takes nothing more; the run goes on by its resume command when it does again."""
    assert run.process is not None
    run.wait_for_step(chance.randrange(520, NUM_UPDATES - 200))
    checkpoints = Path(str(run.folder.checkpoints))
    checkpoints.rename(checkpoints.with_name("kept"))
    checkpoints.touch()  # no file can be written below a file
    run.wait_for_refusal(run.process, run.log, "can't write")
    checkpoints.unlink()
    checkpoints.with_name("kept").rename(checkpoints)
    run.note_fault()
    run.resume()


# Runs the command in a process in which the nodes are listed, and asked only when `FOLDER/gone` is there.
ASKS_LATE = """
import os, sys, time
from dt_ray import train
from dt_ray.distributed import paths
folder, ask = os.environ["DT_RAY_FAULTS_FOLDER"], paths.ask_each_node
def alive():
    nodes = paths.alive_nodes()
    open(folder + "/listed", "w").close()
    while not os.path.exists(folder + "/gone"):
        time.sleep(0.05)
    return nodes
paths.ask_each_node = lambda file: ask(file, alive=alive)
train.main(sys.argv[1:])
"""


def lose_asked_node(run: Run, chance: random.Random) -> None:
    """Kills a node between the moment at which it is listed and that at which it is asked."""
    assert run.process is not None
    run.process.kill()
    run.wait()
    folder = Path(tempfile.mkdtemp(prefix="asked-"))
    os.environ["DT_RAY_FAULTS_FOLDER"] = str(folder)
    run.launcher = ("-c", ASKS_LATE)
    run.start(*run.command, "--overwrite")
    while not (folder / "listed").exists():
        assert run.process.poll() is None, run.log.read_text()
        time.sleep(0.05)
    run.note_fault()
    run.nodes.remove_node(chance.choice(sorted(run.nodes.worker_nodes, key=str)), allow_graceful=False)
    (folder / "gone").touch()


def start_second_run(run: Run, chance: random.Random) -> None:
    """Another run on a cluster that has room for one."""
    run.wait_for_step(chance.randrange(20, NUM_UPDATES - 200))
    run.note_fault()
    log = run.log.with_suffix(".second")
    command = [sys.executable, "-m", "dt_ray.train", *run.command, f"name={run.folder.folder.name}-second"]
    with log.open("wb") as output:
        second = subprocess.Popen(command, stdout=output, stderr=output, env=run.environment)
    run.wait_for_refusal(second, log, "in use by job")


# Holds a placement group until its input ends; exit code 0 if it still has it then.
HOLDS_A_CPU = """
import sys, ray
from ray.util.placement_group import placement_group, placement_group_table
ray.init(log_to_driver=False)
group = placement_group([{"CPU": 1}])
assert group.wait(60)
print("holds", flush=True)
sys.stdin.read()
sys.exit(placement_group_table()[group.id.hex()]["state"] != "CREATED")
"""


def lose_controller_beside(run: Run, chance: random.Random) -> None:
    """Kills the controller; a job that came after the run must keep what it holds."""
    run.wait_for_step(chance.randrange(20, NUM_UPDATES - 200))
    other = subprocess.Popen(
        [sys.executable, "-c", HOLDS_A_CPU], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=run.environment
    )
    assert other.stdin is not None
    assert other.stdout is not None
    assert other.stdout.readline() == b"holds\n"
    run.note_fault()
    kill("TrainController")
    run.wait()
    other.stdin.close()
    assert other.wait(timeout=60) == 0, "another job's placement group was removed"


# An application of another user; it stays until its input ends.
SERVES = """
import sys, urllib.request
from ray import serve
@serve.deployment(ray_actor_options={"num_cpus": 0})
class Other:
    def __call__(self) -> str:
        return "here"
serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[1])})
serve.run(Other.bind(), name="other", route_prefix="/")
print("serves", flush=True)
sys.stdin.read()
assert urllib.request.urlopen(f"http://127.0.0.1:{sys.argv[1]}/").read() == b"here"
serve.shutdown()
"""


def serve_beside(run: Run, chance: random.Random) -> None:
    """Serves the run's policy beside another application, is refused at another address, and ends."""
    run.wait_for_step(chance.randrange(520, NUM_UPDATES - 200))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    other = subprocess.Popen(
        [sys.executable, "-c", SERVES, str(port)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=run.environment
    )
    assert other.stdin is not None
    assert other.stdout is not None
    while (line := other.stdout.readline()) != b"serves\n":
        assert line or other.poll() is None
    log = run.log.with_suffix(".serve")

    def serve(port: int) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "dt_ray.serve", str(run.folder), "--port", str(port)]
        with log.open("wb") as output:
            return subprocess.Popen(command, stdout=output, stderr=output, env=run.environment)

    run.wait_for_refusal(serve(port + 1), log, f"--port {port}")
    ours = serve(port)
    while "serving" not in log.read_text():
        assert ours.poll() is None, log.read_text()
        time.sleep(0.1)
    run.note_fault()
    ours.send_signal(signal.SIGINT)
    assert ours.wait(timeout=60) == 130, log.read_text()
    other.stdin.close()
    assert other.wait(timeout=60) == 0, "another application was ended"


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of fault, what the run is, and how often it is tried in a campaign."""

    what: str
    disturb: Fault
    times: int
    settings: tuple[str, ...] = ("scaling.num_workers=1",)
    storage: Literal["disk", "object store"] = "disk"
    num_nodes: int = 0  # of a cluster of its own; 0: the command starts Ray itself


TWO = ("scaling.num_workers=2", "model.dropout=0", "total_timesteps=6000")
KINDS = {
    "worker": Kind(what="`kill -9` of the train worker, twice", disturb=lose("RayTrainWorker"), times=5),
    "actor": Kind(what="`kill -9` of an evaluation actor, twice", disturb=lose("EpisodePlayer"), times=3),
    "controller": Kind(what="`kill -9` of the Train controller, twice", disturb=lose("TrainController"), times=3),
    "data task": Kind(what="`kill -9` of a data task", disturb=lose_data_task, times=3),
    "ctrl-c": Kind(what="Ctrl-C, then `--resume`", disturb=end_driver(signal.SIGINT), times=2),
    "sigterm": Kind(what="SIGTERM, then `--resume`", disturb=end_driver(signal.SIGTERM), times=2),
    "driver": Kind(what="`kill -9` of the driver, then `--resume`", disturb=end_driver(signal.SIGKILL), times=4),
    "checkpoint": Kind(what="driver killed, newest checkpoint damaged", disturb=damage_checkpoint, times=4),
    "data": Kind(
        what="a data file cut or a bit of it turned",
        disturb=damage_data,
        times=2,
        settings=("scaling.num_workers=1", "data.on_corrupt=skip"),
    ),
    "store": Kind(
        what="S3 answers 500 or drops connections, 3 to 15 s, twice",
        disturb=stop_store,
        times=4,
        storage="object store",
    ),
    "node": Kind(
        what="a node of two killed, replaced", disturb=lose_node(away_s=(2, 30)), times=2, settings=TWO, num_nodes=2
    ),
    "preemption": Kind(
        what="20 s notice, then the node killed, replaced; no other checkpoints",
        disturb=preempt_node,
        times=2,
        settings=(*TWO, "checkpoint.every=0", "evaluation.every=0"),
        num_nodes=2,
    ),
    "elastic": Kind(
        what="a node killed, back later, `num_workers=[1, 2]`",
        disturb=lose_node(away_s=(40, 60)),
        times=2,
        settings=(*TWO, "total_timesteps=11000", "scaling.num_workers=[1, 2]", "scaling.resize_every_s=5"),
        num_nodes=2,
    ),
    "full disk": Kind(
        what="rank 0's disk is full: exit code 2 within 30 s, then `--resume`",
        disturb=fill_disk,
        times=2,
        settings=("scaling.num_workers=2", "model.dropout=0", "evaluation.num_actors=0"),
    ),
    "asked node": Kind(
        what="a node killed between being listed and being asked", disturb=lose_asked_node, times=1, num_nodes=3
    ),
    "two runs": Kind(
        what="another run where there is room for one: exit code 2 within 30 s",
        disturb=start_second_run,
        times=2,
        settings=TWO,
        num_nodes=2,
    ),
    "controller beside": Kind(
        what="`kill -9` of the Train controller beside another job",
        disturb=lose_controller_beside,
        times=2,
        settings=("scaling.num_workers=1", "scaling.cpus_per_worker=1"),
        num_nodes=3,
    ),
    "serve beside": Kind(
        what="`dt_ray.serve` beside another application, ended",
        disturb=serve_beside,
        times=1,
        settings=("scaling.num_workers=1", "scaling.cpus_per_worker=1", "total_timesteps=20000"),
        num_nodes=3,
    ),
}


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

    def __init__(self, folder: Path, seed: int, store: ObjectStore) -> None:
        self.folder, self.seed, self.store = folder, seed, store
        os.environ[MARK] = str(os.getpid())
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
        return Run(folder=folder, command=command, log=self.folder / f"{name}.log", store=self.store, nodes=nodes)

    def _clean_up(self, run: Run) -> None:
        self.store.mend()
        if run.process is not None and run.process.poll() is None:
            run.process.kill()
            run.process.wait()
        if run.nodes is not None:
            run.nodes.shutdown()
        while ray_processes():
            time.sleep(0.2)


def ray_processes(name: str = "") -> list[int]:
    """Ray's processes that this campaign started and that have not ended, or those of a name."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if f"{MARK}={os.getpid()}".encode() in (place / "environ").read_bytes():
                line = (place / "cmdline").read_bytes().decode(errors="replace")
                if line.startswith(f"ray::{name}") or (not name and ("raylet" in line or "gcs_server" in line)):
                    found.append(int(place.name))
    return found


def kill(name: str) -> bool:
    """Kills a process of Ray by the beginning of its name, if there is one."""
    for pid in ray_processes(name)[:1]:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
            return True
    return False

"""Kinds of faults: what is done to a real run, each at moments drawn by chance."""

from __future__ import annotations

import json
import os
import random
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

from dt_ray.config.schema import DataConfig
from dt_ray.data.logs.datasets import read_dataset
from dt_ray.runs.checkpoint import checkpoint_fault
from dt_ray.runs.folder import RunFolder
from support.object_store import ObjectStore
from support.processes import WAIT_S, kill, processes_of, wait_until

NUM_UPDATES = 2000
SETTINGS = [
    f"total_timesteps={NUM_UPDATES}",
    "data.collect=null",
    "data.validation_fraction=0.1",
    "model={context_length: 10, num_layers: 2, width: 32, num_heads: 2, max_timesteps: 200}",
    "optim={batch_size: 32, warmup_steps: 100}",
    "evaluation={num_episodes: 4, every: 1000, num_actors: 1, max_timesteps: 100, target_returns: [-200, -600]}",
    "checkpoint={every: 250, keep: 2}",
    "logging.every=10",
]


@dataclass
class Run:
    """A training command under way, and what was done to it."""

    folder: RunFolder
    command: list[str]
    log: Path
    store: ObjectStore
    ends_within_s: float  # where it can't go on, or is refused once it is connected
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
        status = process.wait(timeout=self.ends_within_s)
        said = log.read_text()
        assert (status, message in said, "Traceback" in said) == (2, True, False), f"exit code {status}: {said[-2000:]}"

    def wait(self) -> int:
        assert self.process is not None
        return self.process.wait(timeout=WAIT_S)

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
        wait_for_the_end_of_ray()
        self.start("--resume", str(self.folder))


Fault = Callable[[Run, random.Random], None]


def wait_for_the_end_of_ray() -> None:
    """Returns when no cluster that was started from here is left."""
    wait_until(lambda: not processes_of("raylet") | processes_of("gcs_server"), what="Ray's processes have not ended")


def lose(process: str) -> Fault:
    """Kills a process of the run, by its name in Ray, twice while the run trains."""

    def disturb(run: Run, chance: random.Random) -> None:
        for moment in sorted(chance.randrange(20, NUM_UPDATES - 200) for _ in range(2)):
            run.wait_for_step(moment)
            run.note_fault()
            kill(f"ray::{process}")

    return disturb


def lose_data_task(run: Run, chance: random.Random) -> None:
    """Kills what reads the data, or lays it out, when it is seen."""
    assert run.process is not None
    wanted = chance.choice(["MapBatches(read)", "_lay_out"])
    while not processes_of(f"ray::{wanted}"):
        assert run.process.poll() is None, f"no {wanted} was seen"
    with suppress(AssertionError):  # it has ended in between: nothing is lost then
        kill(f"ray::{wanted}")
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
    kill("ray::TrainController")
    run.wait()
    other.stdin.close()
    assert other.wait(timeout=WAIT_S) == 0, "another job's placement group was removed"


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
    assert ours.wait(timeout=WAIT_S) == 130, log.read_text()
    other.stdin.close()
    assert other.wait(timeout=WAIT_S) == 0, "another application was ended"


def damage_two_checkpoints(run: Run, chance: random.Random) -> None:
    """Ends the driver and damages the two newest checkpoints before the run is resumed: it goes on from the third."""
    assert run.process is not None
    run.wait_for_step(chance.randrange(820, NUM_UPDATES - 200))
    run.process.kill()
    run.wait()
    complete = [step for step in run.folder.checkpoint_steps() if checkpoint_fault(run.folder.checkpoint(step)) is None]
    for step in complete[-2:]:
        files = Path(str(run.folder.checkpoint(step))).rglob("*")
        damage(chance.choice(sorted(path for path in files if path.is_file())), chance)
    run.note_fault()
    run.resume()


def start_twice(run: Run, module: str, *arguments: str) -> dict[subprocess.Popen[bytes], Path]:
    """Two commands alike at once, with the logs of what they say."""
    both: dict[subprocess.Popen[bytes], Path] = {}
    for name in ("first", "second"):
        log = run.log.with_suffix(f".{name}")
        with log.open("wb") as output:
            both[subprocess.Popen([sys.executable, "-m", module, *arguments], stdout=output, stderr=output)] = log
    return both


def resume_twice(run: Run, chance: random.Random) -> None:
    """Ends the driver, then two commands resume the run at once: one goes on, the other is refused."""
    assert run.process is not None
    run.wait_for_step(chance.randrange(520, NUM_UPDATES - 200))
    run.process.kill()
    run.wait()
    run.note_fault()
    wait_for_the_end_of_ray()
    both = start_twice(run, "dt_ray.train", "--resume", str(run.folder))
    while all(process.poll() is None for process in both):
        time.sleep(0.1)
    refused = next(process for process in both if process.poll() is not None)
    run.wait_for_refusal(refused, both.pop(refused), "is being written by process")
    (run.process,) = both


def collect_twice(run: Run, chance: random.Random) -> None:
    """Two commands collect the same dataset at once: one is kept whole, the other refused."""
    run.wait_for_step(chance.randrange(20, NUM_UPDATES - 200))
    run.note_fault()
    folder = run.log.with_suffix(".collected")
    collecting = ["collect", "--env", "Pendulum-v1", "--behavior", "random", "--episodes", "300"]
    both = start_twice(run, "dt_ray.data", *collecting, "--workers", "0", "--out", str(folder))
    codes = [process.wait(timeout=WAIT_S) for process in both]
    assert sorted(codes) == [0, 2], [log.read_text() for log in both.values()]
    assert read_dataset(DataConfig(path=str(folder))).num_episodes == 300


def lose_tracker(run: Run, chance: random.Random) -> None:
    """MLflow's database is no database any more."""
    run.wait_for_step(chance.randrange(120, NUM_UPDATES - 200))
    run.note_fault()
    Path(str(run.folder.folder.parent / "mlflow.db")).write_bytes(b"gone")


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
    "two checkpoints": Kind(
        what="driver killed, two newest checkpoints damaged",
        disturb=damage_two_checkpoints,
        times=2,
        settings=("scaling.num_workers=1", "checkpoint.keep=4"),
    ),
    "two resumes": Kind(
        what="driver killed, two `--resume` at once: one refused, exit code 2", disturb=resume_twice, times=2
    ),
    "two collections": Kind(
        what="two collections of one dataset beside the run: one refused, exit code 2", disturb=collect_twice, times=2
    ),
    "tracker": Kind(
        what="MLflow's database gone",
        disturb=lose_tracker,
        times=2,
        settings=("scaling.num_workers=1", "logging.trackers=[mlflow]"),
    ),
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

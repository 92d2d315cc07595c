"""A cluster of several nodes: machines as far as one machine can have them, each with its own address and disk.

Where the kernel lets us, a node is a network namespace on a bridge, and a mount namespace that hides a folder from it;
elsewhere all nodes are processes of this machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.examples import free_port, tiny_overrides
from support.processes import WAIT_S, wait_for_nodes, wait_until

pytestmark = pytest.mark.slow

BIN = Path(sys.executable).parent
TOKEN = "0123456789abcdef" * 4
PREFIX = f"dr{os.getpid()}-"  # of the names of links and namespaces, which have at most 15 characters
BRIDGE = f"{PREFIX}br"


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


def can_isolate() -> bool:
    if os.geteuid() != 0 or shutil.which("ip") is None or shutil.which("unshare") is None:
        return False
    with contextlib.suppress(subprocess.CalledProcessError):
        run("ip", "link", "add", BRIDGE, "type", "bridge")
        run("ip", "link", "set", BRIDGE, "up")
        run("unshare", "--mount", "true")
        return True
    return False


class Node:
    """One Ray node: a process that ends with everything it started."""

    def __init__(self, cluster: Nodes, number: int) -> None:
        self.cluster, self.number, self.name = cluster, number, f"{PREFIX}{number}"
        self.address = f"10.77.0.{number}" if cluster.isolated else "127.0.0.1"
        self.disks = {place: cluster.folder / f"{place.name}{number}" for place in cluster.private_places}
        for disk in self.disks.values():
            disk.mkdir()
        if cluster.isolated:
            run("ip", "netns", "add", self.name)
            run("ip", "link", "add", f"{self.name}h", "type", "veth", "peer", "name", "eth0", "netns", self.name)
            run("ip", "link", "set", f"{self.name}h", "master", BRIDGE, "up")
            for command in (f"addr add {self.address}/24 dev eth0", "link set eth0 up", "link set lo up"):
                run("ip", "-n", self.name, *command.split())
        if number == 1:
            role = ["--head", f"--port={cluster.port}", f"--temp-dir={cluster.folder}/ray", "--include-dashboard=false"]
            role += [f"--ray-client-server-port={free_port()}"]
        else:
            role = [f"--address={cluster.nodes[1].address}:{cluster.port}"]
        start = [
            *self.inside(),
            *("sh", "-c", 'until "$@"; do sleep 1; done', "sh"),  # a start that takes 30 s is given up by Ray
            str(BIN / "ray"),
            "start",
            "--block",
            "--num-cpus=1",
            "--object-store-memory=100000000",
        ]
        self.process = subprocess.Popen(
            [*start, f"--node-ip-address={self.address}", *role],
            env=cluster.environment,
            stdout=(cluster.folder / f"node{number}.log").open("w"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def inside(self) -> list[str]:
        """What runs a command on this node: with its address, and disks of its own."""
        if not self.cluster.isolated:
            return []
        mounts = " && ".join(f"mount --bind {disk} {place}" for place, disk in self.disks.items())
        return ["ip", "netns", "exec", self.name, "unshare", "--mount", "sh", "-c", f'{mounts} && exec "$@"', "sh"]

    def kill(self) -> None:
        """As a machine that loses its power: no process of it goes on, none says goodbye."""
        if self.cluster.isolated:
            found = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True, check=False)
            for pid in found.stdout.split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
        else:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(WAIT_S)

    def close(self) -> None:
        self.kill()
        if self.cluster.isolated:
            run("ip", "link", "delete", f"{self.name}h")
            run("ip", "netns", "delete", self.name)


class Nodes:
    def __init__(self, folder: Path) -> None:
        self.folder, self.isolated, self.port = folder, can_isolate(), free_port()
        self.private, session = folder / "private", folder / "ray"
        self.private_places = (self.private, session)  # another disk on every node
        for place in self.private_places:
            place.mkdir()
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": TOKEN,
            "RAY_USAGE_STATS_ENABLED": "0",
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
            # A lost node is noticed sooner than in the half minute that suits real networks.
            "RAY_health_check_period_ms": "1000",
            "RAY_health_check_timeout_ms": "3000",
        }
        self.nodes: dict[int, Node] = {}
        self.add(1)
        self.wait_for(1)

    def add(self, number: int) -> Node:
        self.nodes[number] = Node(self, number)
        return self.nodes[number]

    def wait_for(self, num: int) -> None:
        wait_for_nodes(self.on_head, num)

    def until(self, holds: Callable[[], bool]) -> None:
        wait_until(holds, what=lambda: "".join(file.read_text()[-1500:] for file in self.folder.glob("*.log")))

    def command(self, *arguments: str) -> list[str]:
        """Python on the head node, as `ray job submit` runs it there."""
        return [*self.nodes[1].inside(), sys.executable, *arguments]

    @property
    def driver_environment(self) -> dict[str, str]:
        return self.environment | {"RAY_ADDRESS": f"{self.nodes[1].address}:{self.port}"}

    def on_head(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*arguments),
            env=self.driver_environment,
            cwd=self.folder,
            capture_output=True,
            text=True,
            check=False,
        )

    def close(self) -> None:
        for number in sorted(self.nodes, reverse=True):
            self.nodes[number].close()
        if self.isolated:
            run("ip", "link", "delete", BRIDGE)
        shutil.rmtree(self.folder, ignore_errors=True)


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    # Not pytest's folder: the paths of Ray's sockets may have 107 characters.
    nodes = Nodes(Path(tempfile.mkdtemp(prefix="nodes", dir="/tmp")))
    try:
        for number in (2, 3):
            nodes.add(number)
            nodes.wait_for(number)
        yield nodes
    finally:
        nodes.close()


def lines(run: Path) -> list[dict]:
    file = run / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def in_parts(data: Path, folder: Path) -> Path:
    """A dataset of four files, each with all of the episodes, for workers that stream whole files."""
    parts = folder / "data"
    parts.mkdir()
    for number in range(4):
        for file in data.glob("*.parquet"):
            (parts / f"part-{number}.parquet").write_bytes(file.read_bytes())
    return parts


@pytest.mark.nightly
def test_workers_and_actors_spread_and_data_streams_to_each(nodes: Nodes, pendulum_data: Path, tmp_path: Path) -> None:
    settings = [
        *tiny_overrides(in_parts(pendulum_data, tmp_path), tmp_path),
        "scaling.num_workers=2",
        "scaling.placement_strategy=STRICT_SPREAD",
    ]
    settings += ["scaling.cpus_per_worker=1", "evaluation.num_actors=1", "data.residency=streaming"]
    done = nodes.on_head("-m", "dt_ray.train", "--verbose", *settings)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    summary = json.loads((tmp_path / "runs/tiny/summary.json").read_text())
    assert (summary["status"], summary["step"]) == ("finished", 20)
    assert len(summary["last"]["targets"][0]["episode_returns"]) == 2
    if nodes.isolated:
        workers = re.findall(r"ip=([\d.]+), pid=\d+\) world_rank=", done.stderr)
        assert len(set(workers)) == 2, done.stderr[-4000:]


def test_a_disk_that_some_node_does_not_see_is_refused_before_training(
    nodes: Nodes, pendulum_data: Path, tmp_path: Path
) -> None:
    if not nodes.isolated:
        pytest.skip("all nodes are on one disk here")
    settings = [*tiny_overrides(pendulum_data, tmp_path), "scaling.num_workers=1"]
    done = nodes.on_head("-m", "dt_ray.train", *settings, f"storage_path={nodes.private}/runs")
    assert done.returncode == 2, done.stderr
    assert f"storage_path: {nodes.private}/runs is not there for 10.77.0.2, 10.77.0.3 of 3 nodes" in done.stderr
    assert "s3://" in done.stderr
    assert "Traceback" not in done.stderr
    here = nodes.nodes[1].disks[nodes.private]
    assert not list(here.iterdir())
    relative = nodes.on_head("-m", "dt_ray.train", *settings[:1], *settings[3:], "storage_path=private")
    assert relative.returncode == 2
    shutil.copytree(pendulum_data, here / "here")
    done = nodes.on_head("-m", "dt_ray.train", *settings, f"data.path={nodes.private}/here")
    assert done.returncode == 2, done.stderr
    assert f"data.path: {nodes.private}/here is not there for 10.77.0.2" in done.stderr
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").iterdir())


def test_a_run_survives_a_node_and_grows_with_one(nodes: Nodes, pendulum_data: Path, tmp_path: Path) -> None:
    data = in_parts(pendulum_data, tmp_path)
    settings = [*tiny_overrides(data, tmp_path), "scaling.num_workers=[1, 3]", "scaling.resize_every_s=3"]
    settings += ["total_timesteps=1000000", "evaluation.every=0", "evaluation.num_actors=0", "checkpoint.every=200"]
    settings += ["data.residency=streaming"]
    training = subprocess.Popen(
        nodes.command("-m", "dt_ray.train", *settings),
        env=nodes.driver_environment,
        cwd=nodes.folder,
        stdout=(nodes.folder / "driver.log").open("w"),
        stderr=subprocess.STDOUT,
    )
    folder = tmp_path / "runs/tiny"

    def workers() -> int:
        assert training.poll() is None, (nodes.folder / "driver.log").read_text()
        return int(lines(folder)[-1]["time/workers"]) if lines(folder) else 0

    nodes.until(lambda: workers() == 3 and (folder / "checkpoints/latest").exists())
    nodes.nodes.pop(3).close()
    before = lines(folder)[-1]["step"]
    nodes.until(lambda: workers() == 2 and lines(folder)[-1]["step"] > before)
    nodes.add(4)
    nodes.until(lambda: workers() == 3)
    training.send_signal(signal.SIGTERM)
    assert training.wait(WAIT_S) == 143
    steps = [line["step"] for line in lines(folder)]
    assert steps == sorted(set(steps))
    assert json.loads((folder / "summary.json").read_text())["status"] == "stopped"

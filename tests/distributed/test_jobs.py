"""`ray job submit` on a cluster that was started by `ray start`: the same commands, unchanged."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from pyarrow import fs
from support.commands import succeed
from support.examples import ANY_WORKER_PORT, ROOT, free_port, tiny_overrides
from support.object_store import ObjectStore
from support.processes import WAIT_S, wait_until

from dt_ray.runs.storage import Folder

pytestmark = pytest.mark.slow

BIN = Path(sys.executable).parent


class JobCluster:
    """A head node on loopback, with token authentication."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "token").write_text("0123456789abcdef" * 4)
        self.dashboard = free_port()
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
            "RAY_USAGE_STATS_ENABLED": "0",
            "PATH": f"{BIN}:{os.environ['PATH']}",
        }
        ports = {
            "port": free_port(),
            "dashboard-port": self.dashboard,
            "dashboard-agent-listen-port": free_port(),
            "ray-client-server-port": free_port(),
            **ANY_WORKER_PORT,
        }
        command = [BIN / "ray", "start", "--head", "--block", "--num-cpus=2", f"--temp-dir={folder}/ray"]
        command += ["--node-ip-address=127.0.0.1", "--include-dashboard=true", "--dashboard-host=127.0.0.1"]
        command += [f"--{name}={number}" for name, number in ports.items()]
        self.process = subprocess.Popen(
            command,
            env=self.environment,
            stdout=(folder / "head.log").open("w"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def job(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self.bash(shlex.join(["ray", "job", *arguments]))

    def bash(self, line: str) -> subprocess.CompletedProcess[str]:
        """What a user types, once the job server is up, some seconds after the head."""
        environment = self.environment | {"RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{self.dashboard}"}
        done: list[subprocess.CompletedProcess[str]] = []

        def is_answered() -> bool:
            done[:] = [
                subprocess.run(["bash", "-c", line], env=environment, capture_output=True, text=True, check=False)
            ]
            return "Failed to connect" not in done[0].stderr and "ConnectionError" not in done[0].stderr

        wait_until(is_answered, what=lambda: done[0].stderr)
        return done[0]

    def submit(self, *command: str, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
        working_dir = self.folder / "working_dir"
        working_dir.mkdir(exist_ok=True)
        return self.job("submit", "--working-dir", str(working_dir), *options, "--", "python", "-m", *command)

    def close(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)  # at SIGTERM it waits for half a minute
        self.process.wait(WAIT_S)
        shutil.rmtree(self.folder)


@pytest.fixture(scope="module")
def cluster(object_store: ObjectStore) -> Iterator[JobCluster]:  # in whose environment the head starts
    # Not pytest's folder: the paths of Ray's sockets may have 107 characters.
    cluster = JobCluster(Path(tempfile.mkdtemp(prefix="jobs", dir="/tmp")))
    yield cluster
    cluster.close()


def test_the_readmes_job_trains_in_a_bucket(cluster: JobCluster, pendulum_data: Path) -> None:
    """Its own line, with a bucket's name, as many workers as there are CPUs here, and little to do."""
    fs.copy_files(str(pendulum_data), "s3://bucket/data")
    readme = (ROOT / "README.md").read_text()
    (line,) = re.findall(r"^ray job submit .*$", readme, flags=re.MULTILINE)
    line = line.replace("BUCKET", "bucket").replace("scaling.num_workers=8", "scaling.num_workers=2")
    given = {word.partition("=")[0] for word in line.split()} | {"scaling.num_workers"}
    little = [word for word in tiny_overrides(pendulum_data, Path()) if word.partition("=")[0] not in given]
    process = cluster.bash(f"{line} {shlex.join(little)}")
    assert process.returncode == 0, process.stdout[-3000:] + process.stderr[-3000:]
    summary = json.loads(Folder.at("s3://bucket/runs/big/summary.json").read_text())
    assert (summary["status"], summary["step"]) == ("finished", 20)


def test_a_lost_path_and_a_wrong_token_are_refused(cluster: JobCluster, pendulum_data: Path, tmp_path: Path) -> None:
    settings = tiny_overrides(pendulum_data, tmp_path)
    # A relative path is in the job's copy of its working directory, which is deleted some day.
    lost = cluster.submit("dt_ray.train", *settings, "storage_path=runs", "scaling.num_workers=1")
    assert lost.returncode != 0
    assert "storage_path: " in lost.stdout
    assert "which Ray deletes; give a folder on a disk that all nodes share" in lost.stdout
    wrong = cluster.folder / "wrong"
    wrong.write_text("f" * 64)
    address = f"http://127.0.0.1:{cluster.dashboard}"
    environment = cluster.environment | {"RAY_AUTH_TOKEN_PATH": str(wrong), "RAY_API_SERVER_ADDRESS": address}
    refused = subprocess.run([BIN / "ray", "job", "list"], env=environment, capture_output=True, text=True, check=False)
    assert refused.returncode != 0


@pytest.mark.nightly
def test_a_job_sweeps(cluster: JobCluster, pendulum_data: Path, tmp_path: Path) -> None:
    settings = tiny_overrides(pendulum_data, tmp_path)
    process = cluster.submit("dt_ray.sweep", *settings, "scaling.num_workers=1", "model.context_length={grid: [2, 4]}")
    assert process.returncode == 0, process.stdout[-3000:] + process.stderr[-3000:]
    assert json.loads((tmp_path / "runs/tiny/best.json").read_text())["num_seeds"] == 1
    assert (tmp_path / "runs/tiny/report/report.html").exists()


def test_a_job_that_is_stopped_leaves_a_checkpoint_to_go_on_from(
    cluster: JobCluster, pendulum_data: Path, tmp_path: Path
) -> None:
    settings = [*tiny_overrides(pendulum_data, tmp_path), "scaling.num_workers=1", "scaling.cpus_per_worker=0.5"]
    endless = ("total_timesteps=1000000", "evaluation.every=0", "checkpoint.every=100")
    name = "stopped-job"
    started = cluster.submit("dt_ray.train", *settings, *endless, options=("--no-wait", "--submission-id", name))
    assert started.returncode == 0, started.stderr
    run = tmp_path / "runs/tiny"
    wait_until(lambda: list(run.glob("checkpoints/step-*/MANIFEST.json")))
    assert cluster.job("stop", name).returncode == 0
    assert "was stopped" in cluster.job("status", name).stdout
    assert cluster.job("delete", name).returncode == 0
    step = json.loads((run / "summary.json").read_text())["step"]  # the stop left a checkpoint
    assert (run / f"checkpoints/step-{step:08d}/MANIFEST.json").exists()
    succeed("train", "--resume", str(run), f"total_timesteps={step + 20}", "scaling.num_workers=0", cwd=tmp_path)
    assert json.loads((run / "summary.json").read_text())["step"] == step + 20

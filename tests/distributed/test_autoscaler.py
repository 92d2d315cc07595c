"""Ray's own autoscaler, whose provider starts processes of this machine as nodes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.examples import ANY_WORKER_PORT, free_port, tiny_overrides
from support.processes import WAIT_S, wait_for_nodes

pytestmark = pytest.mark.slow

BIN = Path(sys.executable).parent
HEAD_ID = "f" * 51 + "0" * 5  # what Ray's provider for tests calls its head


class ScalingCluster:
    """A head of one CPU, to which an autoscaler adds up to three nodes of one, and takes them away when they idle."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.address = f"127.0.0.1:{free_port()}"
        config = folder / "cluster.json"
        config.write_text(json.dumps(self.config()))
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": "0123456789abcdef" * 4,
            "RAY_USAGE_STATS_ENABLED": "0",
            "OMP_NUM_THREADS": "1",
        }
        command = [BIN / "ray", "start", "--head", "--block", "--num-cpus=1", "--object-store-memory=100000000"]
        command += ["--node-ip-address=127.0.0.1", f"--port={self.address.partition(':')[2]}"]
        command += [f"--temp-dir={folder}/ray", "--include-dashboard=false", f"--autoscaling-config={config}"]
        command += [f"--ray-client-server-port={free_port()}", f"--dashboard-agent-listen-port={free_port()}"]
        command += [f"--{name}={number}" for name, number in ANY_WORKER_PORT.items()]
        self.head = subprocess.Popen(
            command,
            env=self.environment
            | {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
            | {"RAY_CLOUD_INSTANCE_ID": HEAD_ID, "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID},
            stdout=(folder / "head.log").open("w"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def config(self) -> dict:
        """What `ray up` would be given."""
        none = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
        return {
            "cluster_name": "processes",
            "max_workers": 3,
            "idle_timeout_minutes": 0.1,
            "upscaling_speed": 1.0,
            "provider": {
                "type": "fake_multinode",
                "gcs_address": self.address,
                "head_node_id": HEAD_ID,
                "launch_multiple": True,
                "use_node_id_as_ip": True,
                "disable_node_updaters": True,
                "disable_launch_config_check": True,
            },
            "head_node_type": "ray.head.default",
            "available_node_types": {
                "ray.head.default": {"resources": {"CPU": 1}, "node_config": {}, "max_workers": 0},
                "worker": {
                    "resources": {"CPU": 1, "object_store_memory": 100_000_000},
                    "node_config": {},
                    "min_workers": 0,
                    "max_workers": 3,
                },
            },
            **{f"{name}_commands": [] for name in none},
            **{key: {} for key in ("auth", "docker", "file_mounts")},
            **{key: [] for key in ("cluster_synced_files", "rsync_exclude", "rsync_filter")},
            "file_mounts_sync_continuously": False,
        }

    def python(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *arguments],
            env=self.environment | {"RAY_ADDRESS": self.address},
            capture_output=True,
            text=True,
            check=False,
        )

    def wait_for(self, num_nodes: int) -> None:
        wait_for_nodes(self.python, num_nodes)

    def close(self) -> None:
        os.killpg(self.head.pid, signal.SIGKILL)  # at SIGTERM it waits for half a minute
        self.head.wait(WAIT_S)
        shutil.rmtree(self.folder, ignore_errors=True)


@pytest.fixture
def cluster() -> Iterator[ScalingCluster]:
    # Not pytest's folder: the paths of Ray's sockets may have 107 characters.
    cluster = ScalingCluster(Path(tempfile.mkdtemp(prefix="scaling", dir="/tmp")))
    try:
        cluster.wait_for(1)
        yield cluster
    finally:
        cluster.close()


def test_a_run_waits_for_nodes_and_gives_them_back(
    cluster: ScalingCluster, pendulum_data: Path, tmp_path: Path
) -> None:
    settings = [*tiny_overrides(pendulum_data, tmp_path), "scaling.num_workers=3", "scaling.cpus_per_worker=1"]
    refused = cluster.python("-m", "dt_ray.train", *settings)
    assert refused.returncode == 2
    assert "ask for 3 CPUs and there are 1" in refused.stderr
    planned = cluster.python("-m", "dt_ray.train", "--plan", *settings, "scaling.wait_for_nodes_s=600")
    assert planned.returncode == 2  # and nothing was asked of the autoscaler
    done = cluster.python("-m", "dt_ray.train", *settings, "scaling.wait_for_nodes_s=600")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "waiting up to 600 s for nodes: 3 worker(s)" in done.stderr
    assert json.loads((tmp_path / "runs/tiny/summary.json").read_text())["status"] == "finished"
    cluster.wait_for(1)

"""Workers whose number grows lose nothing that they have trained, and two runs never wait for each other."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster
from support.examples import tiny_overrides
from support.processes import WAIT_S, wait_until

pytestmark = pytest.mark.slow


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    yield cluster
    cluster.shutdown()


def train(cluster: Cluster, log: Path, *settings: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "dt_ray.train", *settings]
    environment = os.environ | {"RAY_ADDRESS": cluster.address}
    with log.open("wb") as output:
        return subprocess.Popen(command, stdout=output, stderr=output, env=environment)


def until(holds: Callable[[], bool], training: subprocess.Popen[bytes], log: Path) -> None:
    def holds_yet() -> bool:
        assert training.poll() is None, log.read_text()[-3000:]
        return holds()

    wait_until(holds_yet, what=log.read_text)


def lines(run: Path) -> list[dict]:
    file = run / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")] if file.exists() else []


@pytest.mark.nightly
def test_workers_that_become_more_go_on_where_the_fewer_were(
    cluster: Cluster, pendulum_data: Path, tmp_path: Path
) -> None:
    settings = [*tiny_overrides(pendulum_data, tmp_path), "scaling.num_workers=[1, 2]", "scaling.resize_every_s=3"]
    settings += ["total_timesteps=1000000", "evaluation.every=0", "evaluation.num_actors=0", "checkpoint.every=0"]
    log, run = tmp_path / "log", tmp_path / "runs/tiny"
    training = train(cluster, log, *settings)
    until(lambda: len(lines(run)) > 20, training, log)
    alone = len(lines(run))
    cluster.add_node(num_cpus=1)
    until(lambda: lines(run)[-1]["time/workers"] == 2, training, log)
    training.send_signal(signal.SIGTERM)
    assert training.wait(WAIT_S) == 143
    found = lines(run)
    first = next(line["step"] for line in found if line["time/workers"] == 2)
    assert first > found[alone - 1]["step"]  # and no checkpoint was due
    steps = [line["step"] for line in found]
    assert steps == sorted(set(steps))
    assert "went back" not in log.read_text()


@pytest.mark.nightly
def test_of_two_runs_one_waits_for_the_other_and_says_so(cluster: Cluster, pendulum_data: Path, tmp_path: Path) -> None:
    shared = [*tiny_overrides(pendulum_data, tmp_path), "scaling.num_workers=1", "evaluation.every=0"]
    first = train(cluster, tmp_path / "first.log", *shared, "name=first", "total_timesteps=1000000")
    until(lambda: len(lines(tmp_path / "runs/first")) > 5, first, tmp_path / "first.log")
    refused = train(cluster, tmp_path / "refused.log", *shared, "name=refused")
    assert refused.wait(WAIT_S) == 2
    said = (tmp_path / "refused.log").read_text()
    assert "0 of 1 CPUs are free; in use by job" in said
    assert "python -m dt_ray.train" in said
    assert "Traceback" not in said
    waits = train(cluster, tmp_path / "second.log", *shared, "name=second", "scaling.wait_for_nodes_s=500")
    until(
        lambda: "waiting up to 500 s for room" in (tmp_path / "second.log").read_text(), waits, tmp_path / "second.log"
    )
    first.send_signal(signal.SIGINT)
    assert first.wait(WAIT_S) == 130
    assert waits.wait(WAIT_S) == 0, (tmp_path / "second.log").read_text()[-3000:]

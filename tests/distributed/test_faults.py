"""A command whose driver is killed; and, nightly, the whole campaign of benchmarks/faults.py."""

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from support.campaign import Campaign
from support.commands import succeed
from support.disturbed import ALGORITHM, plan_fault
from support.examples import ROOT, losses_of, tiny_overrides
from support.faults import KINDS
from support.object_store import ObjectStore
from support.processes import WAIT_S, processes_of, wait_until

from dt_ray.config.schema import RunConfig
from dt_ray.jobs.training import start_run
from dt_ray.runs.folder import RunFolder

TESTS = ROOT / "tests"


@pytest.mark.slow
def test_a_run_goes_on_from_a_killed_driver_as_if_nothing_had_happened(
    tiny_config: RunConfig, pendulum_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KILLED_RUN", tmp_path.name)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(TESTS), *sys.path]))
    settings = ["total_timesteps=2000", "checkpoint.every=50", "evaluation.every=0", "optim.schedule=constant"]
    settings += ["scaling.num_workers=1", "scaling.cpus_per_worker=1", f"algorithm={ALGORITHM}"]
    fault = plan_fault(tiny_config, at=180, kills="dt_ray.train")
    command = [sys.executable, "-m", "dt_ray.train", *tiny_overrides(pendulum_data, tmp_path), *settings]
    driver = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    _, errors = driver.communicate(timeout=WAIT_S)
    assert driver.returncode == -signal.SIGKILL, errors
    assert not fault.exists()
    wait_until(lambda: not processes_of("", mark=f"KILLED_RUN={tmp_path.name}"), what="processes outlive the driver")
    run = RunFolder.of(tiny_config)
    step = run.checkpoint_steps()[-1] + 20  # its worker went on until it noticed
    resume = ["--resume", str(run), f"total_timesteps={step}", "--import", ALGORITHM.partition(":")[0]]
    resume += ["scaling.num_workers=0"]  # with as many threads: the same losses, without another start of Ray
    succeed("train", *resume, cwd=tmp_path)
    scaling = replace(tiny_config.scaling, cpus_per_worker=1)
    whole = replace(run.read_config(), name="whole", algorithm="decision_transformer", scaling=scaling)
    start_run(whole)
    losses = [losses_of(each) for each in (run, RunFolder.of(whole))]
    assert len(losses[0]) == step // 5
    assert losses[0] == losses[1]


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory, object_store: ObjectStore) -> Campaign:
    return Campaign(tmp_path_factory.mktemp("campaign"), seed=1, store=object_store)


@pytest.mark.nightly
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_comes_out_as_if_nothing_had_happened(campaign: Campaign, kind: str) -> None:
    outcome = campaign.run(kind, 0)
    assert outcome.finished
    if kind != "elastic":  # where other numbers of workers add up gradients in other orders
        assert outcome.same_losses
        assert outcome.same_evaluations
        assert outcome.difference == 0

"""One process at a time writes a run, and nobody waits for one that is gone."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from support.object_store import ObjectStore

from dt_ray.config.schema import RunConfig
from dt_ray.errors import RunError
from dt_ray.jobs.training import resume_run, resumed_config, start_run
from dt_ray.runs import lease as leases
from dt_ray.runs.folder import RunFolder
from dt_ray.runs.lease import FILE, STALE_S, Lease
from dt_ray.runs.storage import Folder
from dt_ray.runs.writing import BackgroundWriter
from dt_ray.training.context import LocalContext, StopRequest


@pytest.fixture(params=["disk", "object store"])
def place(
    request: pytest.FixtureRequest, object_store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Folder:
    monkeypatch.setattr(leases, "SETTLE_S", 0.0)
    return Folder.at(f"s3://bucket/{tmp_path.name}/run" if request.param == "object store" else tmp_path / "run")


def test_a_lease_is_held_once_and_given_back(place: Folder) -> None:
    first, second = Lease(place), Lease(place)
    first.acquire()
    first.check_free()  # its holder may write
    with pytest.raises(RunError, match=rf"is being written by process {os.getpid()} on"):
        second.acquire()
    second.close()
    assert place.names() == [FILE]
    first.close()
    assert not (place / FILE).exists()
    with closing(second):
        second.acquire()


def test_a_holder_elsewhere_is_waited_for_until_it_is_stale(place: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    with monkeypatch.context() as patch:
        patch.setattr(leases, "this_host", lambda: "elsewhere pid:[1]")
        Lease(place, clock=lambda: now[0]).acquire()
    with closing(Lease(place, clock=lambda: now[0])) as mine:
        now[0] += STALE_S - 1
        with pytest.raises(RunError, match=r"on elsewhere \(last seen 59 s ago\).* waited for 60 s"):
            mine.acquire()
        now[0] += 2
        mine.acquire()
        assert json.loads((place / FILE).read_text())["pid"] == os.getpid()


def test_a_killed_holder_here_is_not_waited_for(place: Folder) -> None:
    """Also one whose parent has not asked for its end, and whose number is another process's by now."""
    script = "import sys, time; from dt_ray.runs.lease import *; Lease(Folder(sys.argv[1])).acquire()"
    child = subprocess.Popen(
        [sys.executable, "-c", f"{script}; print(1, flush=True); time.sleep(600)", place.uri],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "1\n"
        with pytest.raises(RunError, match=f"process {child.pid}"):
            Lease(place).acquire()
    finally:
        child.send_signal(signal.SIGKILL)
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and is still there as a zombie
    with closing(Lease(place)) as mine:
        mine.acquire()
    child.wait()
    held = {"lease": "x", "host": leases.this_host(), "pid": os.getpid(), "started": "1", "refreshed": 0.0}
    (place / FILE).write_text(json.dumps(held))
    with closing(Lease(place)) as mine:
        mine.acquire()


def test_a_damaged_lease_is_nobodys(place: Folder) -> None:
    (place / FILE).write_text("{")
    with closing(Lease(place)) as mine:
        mine.acquire()


def test_of_many_that_want_a_dead_ones_lease_one_gets_it(tmp_path: Path) -> None:
    place = Folder.at(tmp_path / "run")
    held = {"lease": "x", "host": "elsewhere", "pid": 1, "started": "1", "refreshed": 0.0}
    (place / FILE).write_text(json.dumps(held))
    wanted = [Lease(place) for _ in range(8)]
    got: list[Lease] = []
    start = threading.Barrier(len(wanted))

    def want(lease: Lease) -> None:
        start.wait()
        try:
            lease.acquire()
        except RunError:
            return
        got.append(lease)

    threads = [threading.Thread(target=want, args=(lease,)) for lease in wanted]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 1
    got[0].close()


def test_a_run_under_way_is_neither_resumed_nor_replaced(
    tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused: list[str] = []

    def write_now(writer: BackgroundWriter, write: Callable[[], None]) -> Future[None]:
        """So that the run itself changes nothing while it is looked at."""
        done: Future[None] = Future()
        done.set_result(write())
        return done

    def stop_request(context: LocalContext) -> StopRequest:
        run = RunFolder.of(tiny_config)
        if run.latest_checkpoint()[0] is not None and not refused:
            for start in (
                lambda: resume_run(resumed_config(str(run))),
                lambda: start_run(tiny_config, overwrite=True),
                lambda: start_run(tiny_config),
            ):
                before = run.folder.stamps(recursive=True)
                with pytest.raises(RunError) as error:
                    start()
                refused.append(str(error.value))
                assert run.folder.stamps(recursive=True) == before
        return StopRequest.NONE

    monkeypatch.setattr(BackgroundWriter, "submit", write_now)
    monkeypatch.setattr(LocalContext, "stop_request", stop_request)
    assert start_run(tiny_config).summary["status"] == "finished"
    assert len(refused) == 3
    assert all(f"is being written by process {os.getpid()}" in each for each in refused)
    assert not (RunFolder.of(tiny_config).folder / FILE).exists()
    resume_run(resumed_config(str(RunFolder.of(tiny_config)), ["total_timesteps=25"]))


def test_a_trial_is_not_resumed_while_its_sweep_runs(tiny_config: RunConfig, tmp_path: Path) -> None:
    config = replace(tiny_config, storage_path=f"{tmp_path}/sweep/trials", name="00000")
    start_run(config)
    with closing(Lease(Folder.at(tmp_path / "sweep"))) as sweep:
        sweep.acquire()
        with pytest.raises(RunError, match="is being written"):
            resume_run(resumed_config(str(RunFolder.of(config))))
    resume_run(resumed_config(str(RunFolder.of(config))))


def test_the_command_says_who_writes_and_ends_with_2(tiny_config: RunConfig) -> None:
    run = start_run(tiny_config).run
    with closing(Lease(Folder.at(run))) as lease:
        lease.acquire()
        process = subprocess.run(
            [sys.executable, "-m", "dt_ray.train", "--resume", run], capture_output=True, text=True, check=False
        )
    assert process.returncode == 2
    assert f"is being written by process {os.getpid()}" in process.stderr
    assert "Traceback" not in process.stderr


def test_a_start_that_fails_leaves_no_folder(tiny_config: RunConfig, tmp_path: Path) -> None:
    lease = Lease(Folder.at(tmp_path / "runs/new"))
    lease.acquire()
    lease.close()
    assert not (tmp_path / "runs/new").exists()

"""A `fit` that never waits without a word or an end, with a trainer and a cluster that are played by the test."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayActorError
from support.processes import WAIT_S

from dt_ray.distributed import controller
from dt_ray.distributed.controller import Clock, Fit
from dt_ray.distributed.usage import Group
from dt_ray.errors import ResourceError, StorageError
from dt_ray.training.interrupts import EXCEPTIONS, StoppedEarlyError, stops_asked_of

OURS, OTHERS = "0a" * 16, "0b" * 16


class Cluster:
    """Placement groups by the actor that made them, and what the board says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.groups = [self.group(OTHERS, is_waiting=False)]
        self.state: dict[str, Any] | None = {
            "controller": "handle",
            "controller_id": OURS,
            "is_placed": False,
            "has_ended": False,
            "failure": None,
        }
        self.killed: list[Any] = []
        self.requests: list[str] = []
        self.ended = threading.Event()
        monkeypatch.setattr(controller, "LOOK_EVERY_S", 0.01)
        monkeypatch.setattr(
            controller, "find_groups", lambda *, creator: [g for g in self.groups if g.creator == creator]
        )
        monkeypatch.setattr(controller, "remove_group", self.groups.remove)
        monkeypatch.setattr(controller, "describe_free", lambda: "0 of 4 CPUs are free; in use by job 01")
        monkeypatch.setattr(controller.ray, "kill", self.kill)
        monkeypatch.setattr(Fit, "_look", self.look)
        self.board: Any = SimpleNamespace(ask=SimpleNamespace(remote=self.requests.append))

    @staticmethod
    def group(creator: str, *, is_waiting: bool) -> Group:
        return Group(name="0c" * 18, creator=creator, job="01", resources={"CPU": 4.0}, is_waiting=is_waiting)

    def look(self, fit: Fit | None = None) -> dict[str, Any] | None:
        return self.state

    def kill(self, actor: Any) -> None:
        self.killed.append(actor)
        self.ended.set()

    def fit(self, work: Any, *, max_failures: int = 0, wait_s: float = 0) -> Fit:
        fit = Fit(
            SimpleNamespace(fit=work),  # type: ignore[arg-type]
            self.board,
            max_failures=max_failures,
            needs="2 worker(s)",
            wait_s=wait_s,
        )
        fit._controller, fit._controller_id = "handle", OURS
        return fit

    def wait_for_end(self) -> Any:
        """A controller that goes on until it is killed."""
        self.ended.wait(WAIT_S)
        raise RayActorError


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    return Cluster(monkeypatch)


def test_workers_without_a_place_are_told_of_and_ended(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(controller, "PLACED_WITHIN_S", 0.3)
    monkeypatch.setattr(controller, "SAYS_AFTER_S", 0.0)  # at the first look, however late it comes
    cluster.groups.append(cluster.group(OURS, is_waiting=True))
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(ResourceError, match="2 worker.* no place .* in use by job 01"),
    ):
        cluster.fit(cluster.wait_for_end, max_failures=3).run()
    assert caplog.text.count("waiting up to 0.3 s for room for 2 worker(s)") == 1
    assert cluster.killed == ["handle"]
    assert [group.creator for group in cluster.groups] == [OTHERS]


def test_a_group_that_ray_train_makes_anew_does_not_begin_the_wait_anew(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(controller, "PLACED_WITHIN_S", 0.3)

    def make_anew() -> None:
        while not cluster.ended.wait(0.05):
            cluster.groups[1:] = [] if len(cluster.groups) > 1 else [cluster.group(OURS, is_waiting=True)]

    making = threading.Thread(target=make_anew, daemon=True)
    making.start()
    with pytest.raises(ResourceError):
        cluster.fit(cluster.wait_for_end).run()
    making.join(WAIT_S)


def test_one_workers_failure_ends_the_controller_where_the_others_go_on(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(controller, "ENDS_WITHIN_S", 0.1)
    assert cluster.state is not None
    cluster.state |= {"is_placed": True, "failure": StorageError("the disk is full")}
    with pytest.raises(StorageError, match="the disk is full"):
        cluster.fit(cluster.wait_for_end).run()
    assert cluster.killed == ["handle"]


def test_a_run_without_workers_that_is_asked_to_stop_ends(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(controller, "STOPS_WITHIN_S", 0.1)
    cluster.groups.append(cluster.group(OURS, is_waiting=True))
    fit = cluster.fit(cluster.wait_for_end)
    fit.ask_to_stop()
    with pytest.raises(StoppedEarlyError):
        fit.run()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_ends_early_because_of_a_signal_ends_as_the_signal_says(number: signal.Signals) -> None:
    def end_with(error: Exception) -> None:
        asked = threading.Event()
        with stops_asked_of(asked.set):
            os.kill(os.getpid(), number)
            assert asked.wait(WAIT_S)
            raise error

    with pytest.raises(EXCEPTIONS[number]):
        end_with(StoppedEarlyError())
    with pytest.raises(StorageError):  # what went wrong meanwhile is told
        end_with(StorageError("the disk is full"))


def test_a_stop_is_asked_for_until_the_workers_have_ended(cluster: Cluster) -> None:
    def stop_in_time() -> Any:
        while len(cluster.requests) < 5:
            time.sleep(0.01)
        return SimpleNamespace(return_value="stopped")

    assert cluster.state is not None
    cluster.state["is_placed"] = True
    fit = cluster.fit(stop_in_time)
    fit.ask_to_stop()
    assert fit.run() == "stopped"
    assert set(cluster.requests) == {"stop"}


@pytest.mark.parametrize("answers", [True, False])
def test_a_lost_controller_frees_its_own_groups_alone(cluster: Cluster, answers: bool) -> None:
    """Also where the board is gone too: what it said before is known."""
    attempts: list[int] = []

    def lose_once() -> Any:
        attempts.append(1)
        if len(attempts) == 1:
            cluster.groups += [cluster.group(OURS, is_waiting=False), cluster.group("0d" * 16, is_waiting=True)]
            raise RayActorError
        return SimpleNamespace(return_value="finished")

    if not answers:
        cluster.state = None
    assert cluster.fit(lose_once, max_failures=1).run() == "finished"
    assert [group.creator for group in cluster.groups] == [OTHERS, "0d" * 16]


def test_a_clock_runs_while_something_holds_without_a_break() -> None:
    now = [0.0]
    clock = Clock(lambda: now[0])
    seconds = []
    for holds in (False, True, True, True, False, True, True):
        seconds.append(round(clock.seconds_while(holds)))
        now[0] += 1
    assert seconds == [0, 0, 1, 2, 0, 0, 1]

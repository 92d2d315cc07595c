"""What is asked of an autoscaler: held until it is released or handed over, and never in the way of another run's."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import _AutoscalingCoordinatorActor

from dt_ray.distributed import requests


class Autoscaler:
    """Ray's own coordinator without its process, and the last request that it sent: each replaces the one before."""

    def __init__(self) -> None:
        self.asked: list[dict[str, float]] = []
        self.time = 0.0
        self.coordinator = _AutoscalingCoordinatorActor(
            get_current_time=lambda: self.time, send_resources_request=self.send, get_cluster_nodes=list
        )

    def send(self, bundles: list[dict[str, float]], label_selectors: Any = None) -> None:
        self.asked = bundles

    def num_cpus(self) -> float:
        return sum(bundle["CPU"] for bundle in self.asked)

    def as_actor(self) -> Any:
        names = ("request_resources", "cancel_request")
        return SimpleNamespace(**{n: SimpleNamespace(remote=getattr(self.coordinator, n)) for n in names})


@pytest.fixture
def autoscaler(monkeypatch: pytest.MonkeyPatch) -> Autoscaler:
    autoscaler = Autoscaler()
    monkeypatch.setattr(requests, "_coordinator", autoscaler.as_actor)
    monkeypatch.setattr(requests.ray, "get", lambda answer, timeout: answer)
    monkeypatch.setattr(requests, "_held", [])
    return autoscaler


def test_two_runs_that_wait_are_asked_for_together(autoscaler: Autoscaler) -> None:
    first = requests.NodeRequest([{"CPU": 2.0}] * 3)
    second = requests.NodeRequest([{"CPU": 1.0}])
    assert autoscaler.num_cpus() == 7
    first.release()
    assert autoscaler.num_cpus() == 1
    second.release()
    assert autoscaler.num_cpus() == 0


def test_a_request_is_held_until_it_is_handed_over_and_not_counted_twice(autoscaler: Autoscaler) -> None:
    requests.hold_request([{"CPU": 2.0}])
    requests.hand_over_requests("train-1")
    assert autoscaler.num_cpus() == 2
    requests.release_requests()  # it is the controller's now
    assert autoscaler.num_cpus() == 2
    requests.cancel_request("train-1")
    assert autoscaler.num_cpus() == 0


def test_whatever_ends_the_connection_takes_the_request_back(autoscaler: Autoscaler) -> None:
    requests.hold_request([{"CPU": 2.0}])
    requests.release_requests()
    assert autoscaler.num_cpus() == 0


def test_the_request_of_a_killed_driver_expires(autoscaler: Autoscaler) -> None:
    killed = requests.NodeRequest([{"CPU": 2.0}])
    killed._ended.set()  # nobody renews it
    autoscaler.time = requests.EXPIRE_AFTER_S + 1
    autoscaler.coordinator._tick()
    assert autoscaler.num_cpus() == 0

"""Room on a cluster that others use: nothing starts without a place, and nothing waits without a word or an end."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dt_ray.config.schema import EvaluationConfig, RunConfig, ScalingConfig
from dt_ray.distributed.resources import Node, ResourcePlan, plan_resources
from dt_ray.distributed.room import SETTLES_WITHIN_S, Cluster, Room, wait_for_room
from dt_ray.errors import ResourceError


class World:
    """A cluster over time: `free(t)` of `total(t)` CPUs a node at second t."""

    def __init__(self, total: Any, free: Any) -> None:
        self.time, self.requests = 0.0, []
        self.cluster = Cluster(
            total=lambda: [Node(cpus=cpus) for cpus in total(self.time)],
            free=lambda: [Node(cpus=cpus) for cpus in free(self.time)],
            describe=lambda: "0 of 4 CPUs are free; in use by job 01: python -m dt_ray.train name=first (4 CPUs)",
            request=self.requests.append,
            now=lambda: self.time,
            sleep=self.pass_time,
        )

    def pass_time(self, seconds: float) -> None:
        self.time += seconds


def run(num_workers: Any = 1, *, num_actors: int | None = None, **scaling: Any) -> RunConfig:
    return replace(
        RunConfig(env_id="Pendulum-v1"),
        scaling=ScalingConfig(num_workers=num_workers, **scaling),
        evaluation=EvaluationConfig(num_actors=num_actors),
    )


def find(world: World, config: RunConfig) -> Room[ResourcePlan]:
    return wait_for_room(
        lambda nodes: plan_resources(config, nodes),
        is_fair=lambda wanted, less: less.cpus_per_worker >= min(1.0, wanted.cpus_per_worker),
        cluster=world.cluster,
        wait_s=config.scaling.wait_for_nodes_s,
        bundles=[{"CPU": 1.0}],
    )


def test_a_free_cluster_is_used_at_once_and_whole() -> None:
    world = World(lambda t: [4], lambda t: [4])
    found = find(world, run())
    assert (found.plan.cpus_per_worker, found.plan.num_actors, found.note, world.time) == (3, 1, None, 0)


def test_what_a_run_that_has_just_ended_still_holds_changes_no_plan() -> None:
    world = World(lambda t: [4], lambda t: [4 if t >= 2 else 1])
    assert find(world, run()) == find(World(lambda t: [4], lambda t: [4]), run())


def test_a_second_run_gets_what_the_first_one_leaves() -> None:
    found = find(World(lambda t: [6], lambda t: [2]), run())
    assert (found.plan.cpus_per_worker, found.plan.num_actors) == (1, 1)
    assert found.note is not None
    assert "name=first" in found.note


def test_a_second_run_that_has_no_room_is_refused_with_who_has_it() -> None:
    world = World(lambda t: [4], lambda t: [0])
    with pytest.raises(ResourceError, match=r"in use by job 01: python -m dt_ray.train name=first .*wait_for_nodes_s"):
        find(world, run())
    assert world.time <= SETTLES_WITHIN_S + 1
    assert world.requests == []  # nodes are there


def test_a_second_run_waits_as_long_as_it_may_and_says_for_whom(caplog: pytest.LogCaptureFixture) -> None:
    world = World(lambda t: [4], lambda t: [4 if t >= 100 else 0])
    with caplog.at_level(logging.WARNING, logger="dt_ray"):
        assert find(world, run(wait_for_nodes_s=300)).plan.cpus_per_worker == 3
    assert "waiting up to 300 s for room" in caplog.text
    assert "name=first" in caplog.text
    with pytest.raises(ResourceError, match="name=first"):
        find(world := World(lambda t: [4], lambda t: [0]), run(wait_for_nodes_s=300))
    assert 300 <= world.time <= 302


def test_a_cluster_that_is_too_small_is_refused_at_once_or_grown_by_one_request() -> None:
    world = World(lambda t: [1], lambda t: [1])
    with pytest.raises(ResourceError, match="ask for 3 CPUs and there are 1"):
        find(world, run(3, cpus_per_worker=1))
    assert (world.time, world.requests) == (0, [])
    world = World(lambda t: [1, 1, 1][: 1 + int(t // 20)], lambda t: [1, 1, 1][: 1 + int(t // 20)])
    assert find(world, run(3, cpus_per_worker=1, wait_for_nodes_s=120)).plan.num_workers == 3
    assert world.requests == [[{"CPU": 1.0}]]


def fits(bundles: Sequence[float], nodes: Sequence[float]) -> bool:
    """Whether bundles that must all be placed can be, by trying all ways."""
    for places in itertools.product(range(len(nodes)), repeat=len(bundles)):
        left = list(nodes)
        for bundle, place in zip(bundles, places, strict=True):
            left[place] -= bundle
        if min(left) >= -1e-6:
            return True
    return False


@given(
    nodes=st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), min_size=1, max_size=3),
    num_workers=st.integers(1, 4),
    num_actors=st.none() | st.integers(0, 4),
    cpus_per_worker=st.none() | st.sampled_from([0.5, 1.0, 1.5, 2.0, 4.0]),
)
def test_the_workers_of_every_plan_can_be_placed_on_what_is_free(
    nodes: list[tuple[int, int]], num_workers: int, num_actors: int | None, cpus_per_worker: float | None
) -> None:
    total, free = [max(pair) for pair in nodes], [min(pair) for pair in nodes]
    world = World(lambda t: total, lambda t: free)
    try:
        found = find(world, run(num_workers, num_actors=num_actors, cpus_per_worker=cpus_per_worker)).plan
    except ResourceError:
        assert world.time <= SETTLES_WITHIN_S + 1
        share = cpus_per_worker or 1.0
        assert not fits([share] * num_workers, free) or sum(free) < 1
        return
    assert fits([found.cpus_per_worker] * num_workers, free)
    assert num_workers * found.cpus_per_worker + found.num_actors <= sum(free) + 1e-6


def test_two_workers_of_four_and_three_actors_fit_on_nodes_of_four_and_eight() -> None:
    config = run(2, num_actors=3, cpus_per_worker=4)
    found = find(World(lambda t: [4, 8], lambda t: [4, 8]), config).plan
    assert (found.num_workers, found.num_actors) == (2, 3)

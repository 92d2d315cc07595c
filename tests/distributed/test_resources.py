from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dt_ray.config.schema import EvaluationConfig, RunConfig, ScalingConfig
from dt_ray.distributed.resources import Node, describe_plan, plan_resources, plan_trials
from dt_ray.errors import ResourceError


def config(num_workers: int, *, num_actors: int | None = None, **scaling) -> RunConfig:
    return replace(
        RunConfig(env_id="Pendulum-v1"),
        scaling=ScalingConfig(num_workers=num_workers, **scaling),
        evaluation=EvaluationConfig(num_actors=num_actors),
    )


@pytest.mark.parametrize("cpus", [1, 2, 3, 4, 8, 16, 64])
@pytest.mark.parametrize("num_workers", [1, 2, 4, 7])
@pytest.mark.parametrize("num_actors", [None, 0, 1, 3])
def test_a_plan_never_asks_for_more_than_there_is(cpus: int, num_workers: int, num_actors: int | None) -> None:
    plan = plan_resources(config(num_workers, num_actors=num_actors), [Node(cpus=cpus, gpus=0)])
    assert plan.num_workers == num_workers
    assert plan.cpus_per_worker > 0
    assert num_workers * plan.cpus_per_worker + plan.num_actors <= cpus + 1e-6


def test_a_laptop_trains_on_one_cpu_and_evaluates_on_the_other() -> None:
    plan = plan_resources(config(1), [Node(cpus=2, gpus=0)])
    assert (plan.cpus_per_worker, plan.num_actors, plan.notes) == (1, 1, ())


def test_a_cluster_too_small_for_actors_says_so() -> None:
    plan = plan_resources(config(2), [Node(cpus=2, gpus=0)])
    assert plan.num_actors == 0
    assert "evaluations run in the training process" in plan.notes[0]
    plan = plan_resources(config(1, num_actors=4), [Node(cpus=4, gpus=0)])
    assert plan.num_actors == 3
    assert "3 evaluation actor(s) instead of 4" in plan.notes[0]
    assert plan_resources(config(1, num_actors=0), [Node(cpus=1, gpus=0)]).notes == ()


def test_more_workers_than_cpus_share_them() -> None:
    plan = plan_resources(config(4), [Node(cpus=2, gpus=0)])
    assert plan.cpus_per_worker == 0.5
    assert "4 workers share 2 CPUs: 0.5 each" in plan.notes[0]


def test_what_cannot_fit_is_refused() -> None:
    with pytest.raises(ResourceError, match=r"ask for 6 CPUs and there are 4"):
        plan_resources(config(3, cpus_per_worker=2), [Node(cpus=4, gpus=0)])
    with pytest.raises(ResourceError, match=r"asks for 2 GPU\(s\) and there are 1"):
        plan_resources(config(2, use_gpu=True), [Node(cpus=8, gpus=1)])


def nodes(*cpus: float, gpus: float = 0, kind: str | None = None) -> list[Node]:
    kinds = frozenset() if kind is None else frozenset([kind])
    return [Node(cpus=each, gpus=gpus, accelerators=kinds) for each in cpus]


@given(
    cpus=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    num_workers=st.integers(1, 8),
    num_actors=st.none() | st.integers(0, 4),
)
def test_every_worker_fits_on_a_node(cpus: list[int], num_workers: int, num_actors: int | None) -> None:
    plan = plan_resources(config(num_workers, num_actors=num_actors), nodes(*cpus))
    fits = sum(int(each / plan.cpus_per_worker + 1e-6) for each in cpus)
    assert fits >= num_workers
    assert num_workers * plan.cpus_per_worker + plan.num_actors <= sum(cpus) + 1e-6


def test_a_worker_takes_no_more_than_its_node_has() -> None:
    assert plan_resources(config(1), nodes(2, 2, 2)).cpus_per_worker == 2  # of six
    with pytest.raises(ResourceError, match="don't fit, PACK, on nodes of 2, 2, 2"):
        plan_resources(config(1, cpus_per_worker=4), nodes(2, 2, 2))


def test_workers_that_must_be_apart_or_together_need_the_nodes_for_it() -> None:
    assert plan_resources(config(3, placement_strategy="STRICT_SPREAD"), nodes(2, 2, 2)).num_workers == 3
    with pytest.raises(ResourceError, match="don't fit, STRICT_SPREAD"):
        plan_resources(config(4, placement_strategy="STRICT_SPREAD", cpus_per_worker=1), nodes(2, 2, 2))
    with pytest.raises(ResourceError, match="don't fit, STRICT_PACK"):
        plan_resources(config(3, placement_strategy="STRICT_PACK", cpus_per_worker=1), nodes(2, 2, 2))


def test_actors_are_on_cpu_nodes_beside_gpu_workers() -> None:
    there = nodes(4, 4) + nodes(8, 8, gpus=1, kind="L4")
    plan = plan_resources(config(2, use_gpu=True, cpus_per_worker=8), there)
    assert (plan.num_workers, plan.num_actors) == (2, 4)


def test_a_type_of_gpu_that_is_not_there_is_refused_with_those_that_are() -> None:
    there = nodes(8, 8, gpus=1, kind="L4")
    assert plan_resources(config(2, use_gpu=True, accelerator_type="L4"), there).num_workers == 2
    with pytest.raises(ResourceError, match=r"asks for 1 H100\(s\) and there are 0.*GPUs of type L4"):
        plan_resources(config(1, use_gpu=True, accelerator_type="H100"), there)


def test_a_plan_is_said_in_words() -> None:
    run = config(2, use_gpu=True, accelerator_type="L4", cpus_per_worker=2)
    there = nodes(8, gpus=2, kind="L4")
    said = describe_plan(plan_resources(run, there), run.scaling, there)
    assert said["training workers"] == "2, 2 CPU(s) and a L4 each, PACK"
    assert said["together"] == "6 of 8 CPUs, 2 of 2 GPUs"
    assert said["nodes"] == "8 CPUs 2 GPUs"


@given(
    cpus=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    num_workers=st.integers(0, 4),
    wanted=st.integers(1, 30),
    cpus_per_worker=st.none() | st.sampled_from([0.5, 1.0, 2.0, 4.0]),
    strategy=st.sampled_from(["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"]),
)
def test_trials_at_a_time_fit_on_the_nodes(
    cpus: list[int], num_workers: int, wanted: int, cpus_per_worker: float | None, strategy: Any
) -> None:
    scaling = ScalingConfig(num_workers=num_workers, cpus_per_worker=cpus_per_worker, placement_strategy=strategy)
    try:
        share, trials = plan_trials(scaling, nodes(*cpus), wanted=wanted)
    except ResourceError:
        assert num_workers > 1 or max(cpus) < (cpus_per_worker or 1)
        return
    assert 1 <= trials <= wanted
    free = [float(each) for each in cpus]
    for _ in range(trials if max(1, num_workers) > 1 else 0):
        free[free.index(max(free))] -= 0.01
    for _ in range(trials):  # placed one after the other, where there is most room
        taken: list[int] = []
        for _ in range(max(1, num_workers)):
            allowed = [i for i in range(len(free)) if strategy != "STRICT_SPREAD" or i not in taken]
            if strategy == "STRICT_PACK" and taken:
                allowed = taken[:1]
            elif strategy == "STRICT_PACK":
                allowed = [i for i in allowed if free[i] >= num_workers * share - 1e-6] or allowed
            place = max(allowed, key=lambda i: free[i])
            assert free[place] >= share - 1e-6
            free[place] -= share
            taken.append(place)


def test_a_trial_takes_no_more_than_a_node_has() -> None:
    assert plan_trials(ScalingConfig(num_workers=1), nodes(2, 2, 2), wanted=1) == (2, 1)  # of six
    assert plan_trials(ScalingConfig(num_workers=1), nodes(2, 2, 2), wanted=9) == (1, 6)
    assert plan_trials(ScalingConfig(num_workers=1), nodes(8), wanted=3) == (2, 3)
    with pytest.raises(ResourceError, match=r"1 worker\(s\) with 4 CPU\(s\) each does not fit on nodes of 2, 2 CPUs"):
        plan_trials(ScalingConfig(num_workers=1, cpus_per_worker=4), nodes(2, 2), wanted=1)
    with pytest.raises(ResourceError, match=r"asks for 1 H100\(s\) and there are 0"):
        plan_trials(ScalingConfig(use_gpu=True, accelerator_type="H100"), nodes(8, gpus=1, kind="L4"), wanted=1)
    gpus = ScalingConfig(use_gpu=True, accelerator_type="L4")
    assert plan_trials(gpus, [*nodes(8, gpus=2, kind="L4"), Node(cpus=64)], wanted=9) == (4, 2)
    with pytest.raises(ResourceError, match=r"3 worker\(s\) with 1 CPU\(s\) each and 0.01 of its own does not fit"):
        plan_trials(ScalingConfig(num_workers=3), nodes(3), wanted=1)


def test_a_run_without_an_environment_has_all_cpus_for_its_workers() -> None:
    plan = plan_resources(replace(config(1), env_id=None), [Node(cpus=4, gpus=0)])
    assert (plan.cpus_per_worker, plan.num_actors) == (4, 0)

from dataclasses import replace

import pytest

from dt_ray.config import EvaluationConfig, RunConfig, ScalingConfig
from dt_ray.distributed.resources import plan_resources
from dt_ray.errors import ResourceError


def config(num_workers: int, *, num_actors: int | None = None, **scaling) -> RunConfig:
    return replace(
        RunConfig(),
        scaling=ScalingConfig(num_workers=num_workers, **scaling),
        evaluation=EvaluationConfig(num_actors=num_actors),
    )


@pytest.mark.parametrize("cpus", [1, 2, 3, 4, 8, 16, 64])
@pytest.mark.parametrize("num_workers", [1, 2, 4, 7])
@pytest.mark.parametrize("num_actors", [None, 0, 1, 3])
def test_a_plan_never_asks_for_more_than_there_is(cpus: int, num_workers: int, num_actors: int | None) -> None:
    plan = plan_resources(config(num_workers, num_actors=num_actors), cpus=cpus, gpus=0)
    assert plan.num_workers == num_workers
    assert plan.cpus_per_worker > 0
    assert num_workers * plan.cpus_per_worker + plan.num_actors <= cpus + 1e-6


def test_a_laptop_trains_on_one_cpu_and_evaluates_on_the_other() -> None:
    plan = plan_resources(config(1), cpus=2, gpus=0)
    assert (plan.cpus_per_worker, plan.num_actors, plan.notes) == (1, 1, ())


def test_a_cluster_too_small_for_actors_says_so() -> None:
    plan = plan_resources(config(2), cpus=2, gpus=0)
    assert plan.num_actors == 0
    assert "evaluations run in the training process" in plan.notes[0]
    plan = plan_resources(config(1, num_actors=4), cpus=4, gpus=0)
    assert plan.num_actors == 3
    assert "3 evaluation actor(s) instead of 4" in plan.notes[0]
    assert plan_resources(config(1, num_actors=0), cpus=1, gpus=0).notes == ()


def test_more_workers_than_cpus_share_them() -> None:
    plan = plan_resources(config(4), cpus=2, gpus=0)
    assert plan.cpus_per_worker == 0.5
    assert "4 workers share 2 CPUs: 0.5 each" in plan.notes[0]


def test_what_cannot_fit_is_refused() -> None:
    with pytest.raises(ResourceError, match=r"ask for 6 CPUs and there are 4"):
        plan_resources(config(3, cpus_per_worker=2), cpus=4, gpus=0)
    with pytest.raises(ResourceError, match=r"asks for 2 GPU\(s\) and there are 1"):
        plan_resources(config(2, use_gpu=True), cpus=8, gpus=1)

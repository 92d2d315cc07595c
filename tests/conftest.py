"""Small real datasets, environments and runs that the tests share."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch
from support.examples import tiny_overrides
from support.object_store import ObjectStore
from support.processes import mark_processes

from dt_ray.config.loading import load_config
from dt_ray.config.schema import RunConfig
from dt_ray.data.spaces import SpaceSpec, read_spaces
from dt_ray.jobs.training import name_run
from dt_ray.play.collection import CollectionPlan, collect_here, write_dataset

hypothesis.settings.register_profile("dt_ray", deadline=None)  # a loaded machine is no fault
hypothesis.settings.load_profile("dt_ray")
torch.set_num_threads(1)  # tiny models: a second thread only waits
os.environ.setdefault("OMP_NUM_THREADS", "1")  # in the commands that the tests start too
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # workers of two threads, which would spin while others compute
os.environ.setdefault("RAY_prestart_worker_first_driver", "0")  # a worker for each CPU, most of which idle
os.environ.setdefault("RAY_num_workers_soft_limit", "8")  # keeps idle workers for the next test's tasks
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored, here and in commands, where a shell runs us with &
mark_processes()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that start clusters come first: the quick ones fill what is left of the time at the end."""
    heavy = {item.path for item in items if any(map(item.get_closest_marker, ("ray", "slow")))}
    items.sort(key=lambda item: item.path not in heavy)


@pytest.fixture(scope="session")
def pendulum_spec() -> SpaceSpec:
    return read_spaces("Pendulum-v1")


@pytest.fixture(scope="session")
def pendulum_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve mixed episodes of 50 steps."""
    folder = tmp_path_factory.mktemp("data") / "pendulum"
    plan = CollectionPlan(env_id="Pendulum-v1", behavior="mixed", num_episodes=12, seed=100_000, max_timesteps=50)
    write_dataset(str(folder), collect_here(plan), source=plan.source)
    return folder


@pytest.fixture
def tiny_config(pendulum_data: Path, tmp_path: Path) -> RunConfig:
    """A run of 20 updates in this process, on `pendulum_data`."""
    return name_run(load_config("decision_transformer/pendulum", tiny_overrides(pendulum_data, tmp_path)), "tiny")


@pytest.fixture(scope="session")
def object_store() -> Iterator[ObjectStore]:
    """An S3 server with the bucket `bucket`, that everything started from here reaches."""
    store = ObjectStore()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in store.environment.items():
            patch.setenv(name, value)
        yield store


@pytest.fixture(scope="session")
def ray_cluster(object_store: ObjectStore) -> Iterator[None]:
    """One cluster for all tests marked `ray`: four CPUs by name, whatever the machine has."""
    import ray

    from dt_ray.distributed.cluster import LOCAL_SETTINGS, NO_DASHBOARD, SETTINGS, environment, quiet

    path = {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])}
    with quiet(verbose=False), environment(SETTINGS | LOCAL_SETTINGS | NO_DASHBOARD | path):
        ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
        yield
        ray.shutdown()

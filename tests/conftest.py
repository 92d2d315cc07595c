"""Small real datasets, environments and runs that the tests share."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path

import hypothesis
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from object_store import ObjectStore
from support.processes import mark_processes

from dt_ray.collection import CollectionPlan, collect_here, write_dataset
from dt_ray.config import RunConfig
from dt_ray.config_io import load_config
from dt_ray.data import TransitionDataset
from dt_ray.data.episodes import to_table
from dt_ray.data.spaces import SpaceSpec, read_spaces
from dt_ray.launch import name_run

hypothesis.settings.register_profile("dt_ray", deadline=None)  # a loaded machine is no fault
hypothesis.settings.load_profile("dt_ray")
torch.set_num_threads(1)  # tiny models: a second thread only waits
os.environ.setdefault("OMP_NUM_THREADS", "1")  # in the commands that the tests start too
mark_processes()


def make_episodes(
    lengths: Sequence[int], *, observation_dim: int = 3, action_dim: int = 1, seed: int = 0
) -> TransitionDataset:
    """Random episodes of these lengths, each cut by a time limit; actions within [-2, 2]."""
    generator = np.random.default_rng(seed)
    num = sum(lengths)
    ends = np.cumsum(lengths)
    truncated = np.zeros(num, dtype=bool)
    truncated[ends - 1] = True
    return TransitionDataset(
        observations=generator.normal(size=(num, observation_dim)).astype(np.float32),
        actions=generator.uniform(-2, 2, size=(num, action_dim)).astype(np.float32),
        rewards=generator.normal(size=num).astype(np.float32),
        terminated=np.zeros(num, dtype=bool),
        truncated=truncated,
        starts=ends - np.asarray(lengths),
    )


def write_episodes(data: TransitionDataset, file: Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(to_table(data), file)
    return file


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


def tiny_overrides(data: Path, storage: Path) -> list[str]:
    return [
        "name=tiny",
        f"storage_path={storage}/runs",
        f"data.path={data}",
        "data.collect=null",
        "data.return_noise=0",
        "total_timesteps=20",
        "scaling.num_workers=0",
        "data.validation_fraction=0.2",
        "model={context_length: 4, num_layers: 1, width: 16, dropout: 0.1, max_timesteps: 60}",
        "optim={batch_size: 8, warmup_steps: 2}",
        "evaluation={num_episodes: 2, every: 10, max_timesteps: 20, target_returns: [-100, -300]}",
        "checkpoint={every: 5, keep: 2}",
        "logging.every=5",
    ]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


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

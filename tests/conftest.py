"""Small real datasets, environments and runs that the tests share."""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from pyarrow import fs

from dt_ray.collection import CollectionPlan, collect_here, write_dataset
from dt_ray.config import RunConfig
from dt_ray.config_io import load_config
from dt_ray.data import TransitionDataset
from dt_ray.data.episodes import to_table
from dt_ray.data.spaces import SpaceSpec, read_spaces
from dt_ray.launch import name_run

torch.set_num_threads(1)  # tiny models: a second thread only waits


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
    write_dataset(str(folder), collect_here(plan))
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


class ObjectStore:
    """An S3 server on loopback that fails when it is told to."""

    def __init__(self) -> None:
        from moto.server import DomainDispatcherApplication, create_backend_app
        from werkzeug.serving import make_server

        logging.getLogger("werkzeug").setLevel(logging.CRITICAL)
        self._answer = DomainDispatcherApplication(create_backend_app)
        self._num_failures, self._how = 0, ""
        self._server = make_server("127.0.0.1", 0, self._serve, threaded=True)
        self.url = f"http://127.0.0.1:{self._server.port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def fail(self, num_requests: int, how: Literal["500", "drop"]) -> None:
        """From now on, answers so many requests with an error or a closed connection."""
        self._num_failures, self._how = num_requests, how

    @property
    def has_failed(self) -> bool:
        return self._num_failures <= 0

    def _serve(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        if self.has_failed:
            return self._answer(environ, start_response)
        self._num_failures -= 1
        if self._how == "drop":
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
        start_response("500 Internal Server Error", [])
        return [b""]


@pytest.fixture(scope="session")
def object_store() -> Iterator[ObjectStore]:
    """An S3 server with the bucket `bucket`, that everything started from here reaches."""
    store = ObjectStore()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", store.url)
        patch.setenv("AWS_ACCESS_KEY_ID", "planted-key-id")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "planted-secret")
        patch.setenv("AWS_REGION", "us-east-1")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        fs.S3FileSystem(endpoint_override=store.url, allow_bucket_creation=True).create_dir("bucket")
        yield store


@pytest.fixture(scope="session")
def ray_cluster(object_store: ObjectStore) -> Iterator[None]:
    """One cluster for all tests marked `ray`: four CPUs by name, whatever the machine has."""
    from dt_ray.distributed.cluster import LOCAL_SETTINGS, SETTINGS, quiet

    os.environ.update(SETTINGS | LOCAL_SETTINGS)
    import ray

    with quiet(verbose=False):
        ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
        yield
        ray.shutdown()

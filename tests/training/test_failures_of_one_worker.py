"""What one worker ends with, all workers end with: two plain processes that talk by gloo, without Ray."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
from support.examples import free_port
from support.processes import WAIT_S
from torch import Tensor, nn

from dt_ray.config.schema import RunConfig
from dt_ray.data import read_dataset
from dt_ray.data.spaces import read_spaces
from dt_ray.errors import DataError, DivergedError, RunError, StorageError, UserError
from dt_ray.runs.folder import RunFolder
from dt_ray.runs.storage import Folder
from dt_ray.training import context as contexts
from dt_ray.training.context import LocalContext, StopRequest, together
from dt_ray.training.loop import run_training
from dt_ray.training.resident import ResidentData, ResidentSource

TrainOnTwo = Callable[[RunConfig, str], list[tuple[str, str]]]
WAITS_AT_MOST = timedelta(seconds=WAIT_S / 2)  # for the other worker; a test that comes to it has failed


class GlooContext(LocalContext):
    """One of two processes."""

    world_size = 2

    def __init__(self, config: RunConfig, rank: int) -> None:
        super().__init__(config)
        self.rank = rank

    def data_parallel(self, module: nn.Module) -> nn.Module:
        return nn.parallel.DistributedDataParallel(module)

    def sum(self, value: Tensor) -> Tensor:
        value = value.clone()
        torch.distributed.all_reduce(value)
        return value

    def gather(self, value: Any) -> list[Any]:
        values = [None] * self.world_size
        torch.distributed.all_gather_object(values, value)
        return values

    def latest_checkpoint(self) -> Folder | None:
        def look() -> Folder | None:
            return RunFolder.of(self.config).latest_checkpoint()[0] if self.rank == 0 else None

        return self.gather(together(self, look))[0]

    def report(self, metrics: Any) -> None:
        torch.distributed.barrier()


def raises(error: Exception) -> Callable[..., Any]:
    def fail(*arguments: Any, **settings: Any) -> Any:
        raise error

    return fail


@contextmanager
def fault(kind: str, rank: int, config: RunConfig) -> Iterator[None]:
    """What one worker meets and the other one does not."""
    with pytest.MonkeyPatch.context() as patch:
        if kind == "storage" and rank == 0:
            patch.setattr("dt_ray.training.recorder.write_checkpoint", raises(StorageError("the disk is full")))
        if kind == "first metrics" and rank == 0:
            patch.setattr(Folder, "append_text", raises(StorageError("the disk is full")))
        if kind == "evaluation" and rank == 0:
            patch.setattr(LocalContext, "evaluate", raises(UserError("the environment is broken")))
        if kind == "recorder" and rank == 0:
            patch.setattr("dt_ray.training.loop.Recorder", raises(StorageError("the log can't be read")))
        if kind.startswith("data at ") and rank == 1:
            batch, at = ResidentSource.batch, int(kind.removeprefix("data at "))

            def cut(source: ResidentSource, step: int) -> Any:
                if step >= at:
                    raise DataError(f"episode 3 can't be read at update {step}")
                return batch(source, step)

            patch.setattr(ResidentSource, "batch", cut)
        if kind == "restore" and rank == 1:
            patch.setattr("dt_ray.training.loop.restore_learner", raises(RunError("the checkpoint is not there yet")))
        if kind == "divergence" and rank == 1:
            batch = ResidentSource.batch

            def spoil(source: ResidentSource, step: int) -> Any:
                drawn = batch(source, step)
                return drawn if step < 7 else replace(drawn, actions=drawn.actions * torch.nan)

            patch.setattr(ResidentSource, "batch", spoil)
        yield


def train(rank: int, port: int, config: RunConfig, kind: str) -> tuple[str, str]:
    """How one worker ends."""
    torch.distributed.init_process_group(
        "gloo", f"tcp://127.0.0.1:{port}", world_size=2, rank=rank, timeout=WAITS_AT_MOST
    )
    spec = read_spaces(config.env_id)
    data = ResidentData.build(read_dataset(config.data, spec), spec, config)
    source = ResidentSource(data, config, rank=rank, world_size=2)
    try:
        with fault(kind, rank, config):
            run_training(config, source, GlooContext(config, rank))
        return "finished", ""
    except UserError as error:
        return type(error).__name__, str(error)
    except Exception as error:
        return "not a user's", str(error)
    finally:
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def workers() -> Iterator[ProcessPoolExecutor]:
    """Two processes, which import torch once."""
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool


@pytest.fixture
def train_on_two(workers: ProcessPoolExecutor) -> TrainOnTwo:
    """Trains, and says how both workers ended, in the order of their ranks."""

    def run(config: RunConfig, kind: str) -> list[tuple[str, str]]:
        port = free_port()
        ends = [workers.submit(train, rank, port, config, kind) for rank in (0, 1)]
        return [end.result(timeout=WAIT_S) for end in ends]

    return run


@pytest.fixture
def config(tiny_config: RunConfig) -> RunConfig:
    return replace(tiny_config, model=replace(tiny_config.model, dropout=0.0))


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("storage", StorageError, "the disk is full"),
        ("first metrics", StorageError, "the disk is full"),
        ("recorder", StorageError, "the log can't be read"),
        ("evaluation", UserError, "the environment is broken"),
        ("data at 0", DataError, "episode 3 can't be read at update 0"),
        ("data at 7", DataError, "episode 3 can't be read at update 7"),
        ("data at 19", DataError, "episode 3 can't be read at update 19"),
        ("divergence", DivergedError, "the loss became nan at update 8"),
    ],
)
def test_what_one_worker_ends_with_all_end_with(
    config: RunConfig, train_on_two: TrainOnTwo, kind: str, error: type[UserError], message: str
) -> None:
    ends = train_on_two(config, kind)
    assert [name for name, _ in ends] == [error.__name__] * 2
    assert all(message in each for _, each in ends), ends


def test_a_checkpoint_that_one_worker_does_not_see_ends_all(config: RunConfig, train_on_two: TrainOnTwo) -> None:
    assert train_on_two(replace(config, total_timesteps=5), "") == [("finished", "")] * 2
    ends = train_on_two(config, "restore")
    assert ends == [("RunError", "the checkpoint is not there yet")] * 2


@pytest.mark.parametrize("failing", [11, 13, 16])
def test_nothing_that_is_spoilt_by_the_failure_is_saved(
    config: RunConfig, train_on_two: TrainOnTwo, failing: int
) -> None:
    """Until the others know, the failing worker trains on an old batch: no checkpoint may hold what comes of that."""
    assert [name for name, _ in train_on_two(config, f"data at {failing}")] == ["DataError"] * 2
    assert RunFolder.of(config).checkpoint_steps()[-1] == failing // 5 * 5
    assert train_on_two(config, "") == [("finished", "")] * 2
    whole = replace(config, name="whole")
    assert train_on_two(whole, "") == [("finished", "")] * 2
    weights = [
        (RunFolder.of(each).checkpoint(20) / "policy/model.safetensors").read_bytes() for each in (config, whole)
    ]
    assert weights[0] == weights[1]


def test_workers_ask_each_other_within_a_few_updates(config: RunConfig, train_on_two: TrainOnTwo) -> None:
    """Where nothing is due to be written, the failure is known after `EXCHANGE_EVERY` updates, not at the end."""
    quiet = replace(
        config,
        total_timesteps=10_000_000,
        logging=replace(config.logging, every=10_000_000),
        checkpoint=replace(config.checkpoint, every=0),
        evaluation=replace(config.evaluation, every=0),
    )
    assert [name for name, _ in train_on_two(quiet, "data at 5")] == ["DataError"] * 2
    assert contexts.EXCHANGE_EVERY <= 10


class MovedContext(LocalContext):
    """Asked to make room for other workers at update 7."""

    num_calls = 0

    def stop_request(self) -> StopRequest:
        self.num_calls += 1
        return StopRequest.MOVE if self.num_calls == 7 else StopRequest.NONE


def test_workers_that_make_room_for_others_leave_all_that_they_trained(config: RunConfig) -> None:
    spec = read_spaces(config.env_id)
    data = ResidentData.build(read_dataset(config.data, spec), spec, config)
    result = run_training(config, ResidentSource(data, config), MovedContext(config))
    assert result.summary == {}
    assert RunFolder.of(config).latest_checkpoint()[0] == RunFolder.of(config).checkpoint(7)
    assert not (Path(str(RunFolder.of(config))) / "summary.json").exists()

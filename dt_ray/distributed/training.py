"""Runs the training loop in Ray Train's workers; the logic of the loop is not here."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import ray
import ray.exceptions
import ray.train
import ray.train.torch
import torch
import torch.distributed
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from torch import Tensor, nn

from dt_ray.config.schema import RunConfig
from dt_ray.data.held_out import HeldOutEpisodes
from dt_ray.distributed.actors import RunBoard
from dt_ray.distributed.cluster import quiet
from dt_ray.distributed.controller import Fit, TellsTheRun
from dt_ray.distributed.evaluation import EvaluationActors
from dt_ray.distributed.network import NodeTorchConfig
from dt_ray.distributed.preparing import SharedData
from dt_ray.distributed.requests import cancel_request, hand_over_requests
from dt_ray.distributed.resources import ResourcePlan, describe_workers
from dt_ray.errors import UserError
from dt_ray.learners import Policy
from dt_ray.runs.evaluation_report import EvaluationReport
from dt_ray.runs.folder import RunFolder
from dt_ray.runs.storage import Folder
from dt_ray.training.context import EXCHANGE_EVERY, StopRequest, evaluate_here, together
from dt_ray.training.interrupts import stops_asked_of
from dt_ray.training.loop import run_training
from dt_ray.training.preparing import make_source
from dt_ray.training.recorder import TrainResult
from dt_ray.training.sharded import ReadBlocks, ShardedData

WATCHES_FOR_PREEMPTION = os.environ.get("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "1") != "0"
LISTEN_EVERY_S = 1.0  # while the board is being restarted
NOTICE_EVERY_S = 5.0  # seconds between two looks for a preemption notice, which is a barrier


class RayTrainContext:
    """One worker of a `TorchTrainer`: gradients and sums over gloo or NCCL, evaluations on actors."""

    def __init__(self, config: RunConfig, plan: ResourcePlan, board: Any) -> None:
        place = ray.train.get_context()
        self.config = config
        self.rank, self.world_size = place.get_world_rank(), place.get_world_size()
        self.device = ray.train.torch.get_device()
        self.actors: EvaluationActors | None = None
        self.board, self.stop_asked, self.move_asked = board, threading.Event(), threading.Event()
        self._num_calls, self._looked_at = 0, time.monotonic()
        if self.rank == 0:
            if plan.num_actors:  # only now, so that they don't take the workers' places
                self._start_actors(plan.num_actors, num_cpus=plan.cpus_per_actor)
            threading.Thread(target=self._listen, daemon=True, name="board").start()

    def _start_actors(self, num_actors: int, *, num_cpus: float) -> EvaluationActors:
        started = EvaluationActors.start(num_actors, num_cpus=num_cpus)
        assert self.config.env_id is not None, "no actors are planned without an environment"
        self.actors = EvaluationActors(started, self.config.env_id, self.config.evaluation, self.config.env_kwargs)
        return self.actors

    def _listen(self) -> None:
        """Waits for requests on the board, also after the board was restarted."""
        while not self.stop_asked.is_set() and not self.move_asked.is_set():
            try:
                request = ray.get(self.board.wait.remote())
            except ray.exceptions.RayError:  # it is being restarted, or the driver has ended
                time.sleep(LISTEN_EVERY_S)
                continue
            (self.stop_asked if request == "stop" else self.move_asked).set()

    def stop_request(self) -> StopRequest:
        self._num_calls += 1
        if self.world_size > 1 and self._num_calls % EXCHANGE_EVERY:
            return StopRequest.NONE
        stop, move = self.stop_asked.is_set(), self.move_asked.is_set()
        look = WATCHES_FOR_PREEMPTION and self.rank == 0 and time.monotonic() - self._looked_at > NOTICE_EVERY_S
        if self.world_size > 1:
            asked = torch.tensor([stop, move, look], dtype=torch.float32, device=self.device)
            stop, move, look = self.sum(asked).tolist()
        if stop:
            return StopRequest.STOP
        if move:
            return StopRequest.MOVE
        if look:
            self._looked_at = time.monotonic()
            if ray.train.get_preemption_info() is not None:  # and again every few seconds, until the machine is gone
                return StopRequest.SAVE
        return StopRequest.NONE

    def data_parallel(self, module: nn.Module) -> nn.Module:
        if self.world_size == 1:
            return module
        return nn.parallel.DistributedDataParallel(module, broadcast_buffers=False, gradient_as_bucket_view=True)

    def sum(self, value: Tensor) -> Tensor:
        if self.world_size > 1:
            value = value.clone()
            torch.distributed.all_reduce(value)
        return value

    def gather(self, value: Any) -> list[Any]:
        values = [value]
        if self.world_size > 1:
            values = [None] * self.world_size
            torch.distributed.all_gather_object(values, value)
        return values

    def report(self, metrics: Mapping[str, float]) -> None:
        # The run folder has the checkpoints, so Ray Train gets none. Its controller takes no reports while it waits for
        # the workers of an elastic run to save.
        if not self.config.scaling.is_elastic:
            ray.train.report(dict(metrics))

    def report_evaluation(self, report: EvaluationReport) -> None:
        pass  # the trial's own process reads it from the run's folder

    def latest_checkpoint(self) -> Folder | None:
        def look() -> Folder | None:  # the other ranks' view of a shared disk may be an older one
            return RunFolder.of(self.config).latest_checkpoint()[0] if self.rank == 0 else None

        return self.gather(together(self, look))[0]

    @property
    def evaluates_here(self) -> bool:
        return self.actors is None

    def evaluate(
        self, policy: Policy, held_out: HeldOutEpisodes | None, *, step: int, again: bool = False
    ) -> Future[EvaluationReport]:
        if self.actors is not None:
            return self.actors.submit(policy, step=step)
        if again and self.config.env_id is not None:  # the environment may have ended the process before this one
            return self._start_actors(1, num_cpus=0).submit(policy, step=step)
        return evaluate_here(policy, held_out, self.config, step=step)

    def close(self) -> None:
        if self.rank == 0:
            self.board.note_end.remote()
        if self.actors is not None:
            self.actors.end()


def train_on_ray(
    config: RunConfig,
    data: SharedData,
    plan: ResourcePlan,
    *,
    stopping: Callable[[Callable[[], object]], AbstractContextManager[None]] = stops_asked_of,
    verbose: bool = False,
) -> TrainResult:
    """Trains with a `TorchTrainer` on the cluster that is joined; lost workers are replaced.

    `stopping` surrounds the training; it gets a function that asks for an end after the current update.

    Raises:
        UserError: a worker failed in a way that the user can mend.
    """
    board: Any = ray.remote(num_cpus=0, max_restarts=-1, scheduling_strategy=_driver_node())(RunBoard).remote()
    trainer = ray.train.torch.TorchTrainer(
        _work,
        train_loop_config={"config": config, "data": replace(data, shards=()), "plan": plan, "board": board},
        datasets={shard_name(number): shard for number, shard in enumerate(data.shards)},
        dataset_config=ray.train.DataConfig(datasets_to_split=[]),  # a pass is split anew, by `PoolPlan`
        torch_config=NodeTorchConfig(),
        scaling_config=ray.train.ScalingConfig(
            num_workers=plan.num_workers if plan.max_workers is None else (plan.num_workers, plan.max_workers),
            use_gpu=plan.use_gpu,
            resources_per_worker={"CPU": plan.cpus_per_worker} | ({"GPU": 1} if plan.use_gpu else {}),
            accelerator_type=config.scaling.accelerator_type,
            placement_strategy=config.scaling.placement_strategy,
            elastic_resize_monitor_interval_s=config.scaling.resize_every_s,
        ),
        run_config=ray.train.RunConfig(
            name=".ray",  # Ray Train's own files, inside the run's folder
            storage_path=str(RunFolder.of(config).folder),
            failure_config=ray.train.FailureConfig(max_failures=config.scaling.max_failures),
            callbacks=[TellsTheRun(board)],  # type: ignore[list-item]
        ),
    )
    fit = Fit(
        trainer,
        board,
        max_failures=config.scaling.max_failures,
        needs=describe_workers(plan),
        wait_s=config.scaling.wait_for_nodes_s,
    )
    request = f"train-{trainer.train_run_context.run_id}"  # the controller's own
    hand_over_requests(request)
    try:
        with quiet(verbose), stopping(fit.ask_to_stop):
            outcome = fit.run()
    except BaseException:
        cancel_request(request)  # a lost or killed controller does not do it
        raise
    finally:
        ray.kill(board)
    if isinstance(outcome, UserError):
        raise outcome
    assert isinstance(outcome, TrainResult)
    return outcome


def shard_name(number: int) -> str:
    """The name by which the workers get the episodes of a dataset of the run."""
    return f"episodes-{number}"


def read_shards(num_datasets: int) -> ReadBlocks:
    """Reads the blocks of a run's datasets, in a worker: each can read all of them."""
    shards: list[Any] = [ray.train.get_dataset_shard(shard_name(number)) for number in range(num_datasets)]
    refs: list[Any] = [ref for shard in shards for ref in shard.materialize().to_arrow_refs()]
    return lambda blocks: ray.get([refs[block] for block in blocks])


def _driver_node() -> Any:
    """Places an actor on the driver's node, so that it is lost only together with the driver."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def _work(settings: dict[str, Any]) -> TrainResult | UserError:
    """Runs in a worker. A `UserError` is returned and not raised, because Ray Train would retry it."""
    config, plan = settings["config"], settings["plan"]
    # More threads than cores spin and wait for each other, whatever number of CPUs the cluster was told.
    torch.set_num_threads(max(1, min(int(plan.cpus_per_worker), os.cpu_count() or 1)))
    context = RayTrainContext(config, plan, settings["board"])
    data = settings["data"].fetch()
    shape = {"rank": context.rank, "world_size": context.world_size, "device": context.device}
    shape["workers_on_node"] = ray.train.get_context().get_local_world_size()
    try:
        read = read_shards(len(config.data.paths)) if isinstance(data, ShardedData) else None
        source = together(context, lambda: make_source(data, config, read=read, **shape))
        return run_training(config, source, context)
    except UserError as error:
        context.board.note.remote(failure=error)  # in case the other workers do not end
        return error
    finally:
        context.close()

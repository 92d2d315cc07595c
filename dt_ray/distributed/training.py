"""The training loop in Ray Train's workers: connecting it, and nothing of its logic."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from typing import Any

import ray
import ray.exceptions
import ray.train
import ray.train.torch
import torch
import torch.distributed
from ray import PlacementGroupID
from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group
from torch import Tensor, nn

from dt_ray.config import RunConfig
from dt_ray.context import Wish, evaluate_here
from dt_ray.distributed.actors import StopSign
from dt_ray.distributed.cluster import quiet
from dt_ray.distributed.evaluation import EvaluationActors, try_environment_on_ray
from dt_ray.distributed.network import NodeTorchConfig
from dt_ray.distributed.resources import ResourcePlan
from dt_ray.errors import UserError
from dt_ray.interrupts import stops_asked_of
from dt_ray.learners import Policy
from dt_ray.loop import run_training
from dt_ray.recording import TrainResult
from dt_ray.runs import RunFolder
from dt_ray.storage import Folder
from dt_ray.streaming import make_source

log = logging.getLogger("dt_ray")

WATCHES_FOR_PREEMPTION = os.environ.get("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "1") != "0"
LOOK_EVERY = 10  # updates of several workers between two exchanges of what is asked of them
NOTICE_EVERY_S = 5.0  # seconds between two looks for a preemption notice, which is a barrier


class RayTrainContext:
    """One worker of a `TorchTrainer`: gradients and sums over gloo or NCCL, evaluations on actors."""

    def __init__(self, config: RunConfig, actors: Sequence[Any], sign: Any) -> None:
        place = ray.train.get_context()
        self.config = config
        self.rank, self.world_size = place.get_world_rank(), place.get_world_size()
        self.device = ray.train.torch.get_device()
        self.actors = None
        if actors and self.rank == 0:
            self.actors = EvaluationActors(actors, config.env_id, config.evaluation, config.env_kwargs)
        self._stop_asked = threading.Event()
        self._num_calls, self._looked_at = 0, time.monotonic()
        if self.rank == 0:
            threading.Thread(target=self._wait_for, args=(sign,), daemon=True, name="stop sign").start()

    def _wait_for(self, sign: Any) -> None:
        with contextlib.suppress(ray.exceptions.RayError):  # the driver is gone, and the workers soon will be
            ray.get(sign.wait.remote())
            self._stop_asked.set()

    def wish(self) -> Wish:
        self._num_calls += 1
        if self.world_size > 1 and self._num_calls % LOOK_EVERY:
            return Wish.GO_ON
        stop = self._stop_asked.is_set()
        look = WATCHES_FOR_PREEMPTION and self.rank == 0 and time.monotonic() - self._looked_at > NOTICE_EVERY_S
        if self.world_size > 1:
            stop, look = self.sum(torch.tensor([stop, look], dtype=torch.float32, device=self.device)).tolist()
        if stop:
            return Wish.STOP
        if look:
            self._looked_at = time.monotonic()
            if ray.train.get_preemption_info() is not None:  # and again every few seconds, until the machine is gone
                return Wish.SAVE
        return Wish.GO_ON

    def data_parallel(self, module: nn.Module) -> nn.Module:
        if self.world_size == 1:
            return module
        return nn.parallel.DistributedDataParallel(module, broadcast_buffers=False, gradient_as_bucket_view=True)

    def sum(self, value: Tensor) -> Tensor:
        if self.world_size > 1:
            value = value.clone()
            torch.distributed.all_reduce(value)
        return value

    def report(self, metrics: Mapping[str, float]) -> None:
        # Checkpoints are the run folder's, which every context writes alike; Ray Train keeps no second account of them.
        ray.train.report(dict(metrics))

    def latest_checkpoint(self) -> Folder | None:
        return RunFolder.of(self.config).latest_checkpoint()[0]

    def evaluate(self, policy: Policy, *, step: int) -> Future[dict[str, Any]]:
        if self.actors is not None:
            return self.actors.submit(policy, step=step)
        return evaluate_here(policy, self.config, step=step)


def train_on_ray(
    config: RunConfig,
    data: ray.ObjectRef,
    plan: ResourcePlan,
    *,
    stopping: Callable[[Callable[[], object]], AbstractContextManager[None]] = stops_asked_of,
    prepare_folder: Callable[[], None] = lambda: None,
    verbose: bool = False,
) -> TrainResult:
    """Trains with a `TorchTrainer` on the cluster that is joined; lost workers are replaced.

    `prepare_folder` is called when the evaluation actors have played a little of the environment. While it trains,
    `stopping` is entered: it is given what to call for an end after the update under way.

    Raises:
        UserError: what an actor or a worker ended with, if the user can mend it.
    """
    actors = EvaluationActors.start(plan.num_actors, num_cpus=plan.cpus_per_actor)
    sign: Any = ray.remote(num_cpus=0, max_restarts=-1)(StopSign).remote()
    try:
        if actors:
            try_environment_on_ray(config, actors)
        prepare_folder()
        trainer = _make_trainer(config, data, plan, actors, sign)
        with quiet(verbose), stopping(lambda: sign.ask.remote()):
            outcome = _fit(trainer, max_failures=config.scaling.max_failures)
    finally:
        for actor in (*actors, sign):
            ray.kill(actor)
    if isinstance(outcome, UserError):
        raise outcome
    assert isinstance(outcome, TrainResult)
    return outcome


def _make_trainer(
    config: RunConfig, data: ray.ObjectRef, plan: ResourcePlan, actors: Sequence[Any], sign: Any
) -> ray.train.torch.TorchTrainer:
    return ray.train.torch.TorchTrainer(
        _work,
        train_loop_config={
            "config": config,
            "data": data,
            "actors": actors,
            "sign": sign,
            "cpus": plan.cpus_per_worker,
        },
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
        ),
    )


def _fit(trainer: ray.train.torch.TorchTrainer, *, max_failures: int) -> Any:
    """What rank 0 returned.

    In a thread, so that signals are handled by us and not by Ray Train, which drops the workers. It replaces lost
    workers but not its own controller: a run that has lost that is fitted again.
    """
    outcome: Future[Any] = Future()
    before = set(placement_group_table())

    def fit(attempts_left: int) -> None:
        try:
            outcome.set_result(trainer.fit().return_value)
        except ray.exceptions.RayActorError as error:
            if attempts_left == 0:
                outcome.set_exception(error)
                return
            log.warning("lost Ray Train's controller; going on from the newest checkpoint")
            for name in set(placement_group_table()) - before:  # else its workers' CPUs are taken for ever
                remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(name))))
            fit(attempts_left - 1)
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=fit, args=(max_failures,), daemon=True, name="fit").start()
    return outcome.result()


def _work(settings: dict[str, Any]) -> TrainResult | UserError:
    """A worker. What the user must mend is returned, not raised: Ray Train would try it again."""
    config: RunConfig = settings["config"]
    # More threads than cores spin and wait for each other, whatever number of CPUs the cluster was told.
    torch.set_num_threads(max(1, min(int(settings["cpus"]), os.cpu_count() or 1)))
    context = RayTrainContext(config, settings["actors"], settings["sign"])
    data: Any = ray.get(settings["data"])
    source = make_source(data, config, rank=context.rank, world_size=context.world_size, device=context.device)
    try:
        return run_training(config, source, context)
    except UserError as error:
        return error

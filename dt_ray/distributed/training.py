"""The training loop in Ray Train's workers: connecting it, and nothing of its logic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed
from torch import Tensor, nn

from dt_ray.config import RunConfig
from dt_ray.distributed.cluster import quiet
from dt_ray.distributed.evaluation import EvaluationActors
from dt_ray.distributed.resources import ResourcePlan
from dt_ray.errors import UserError
from dt_ray.evaluation import evaluate
from dt_ray.learners import Policy
from dt_ray.loop import TrainResult, run_training
from dt_ray.runs import RunFolder
from dt_ray.sources import ResidentSource
from dt_ray.storage import Folder


class RayTrainContext:
    """One worker of a `TorchTrainer`: gradients and sums over gloo or NCCL, evaluations on actors."""

    def __init__(self, config: RunConfig, actors: Sequence[Any]) -> None:
        place = ray.train.get_context()
        self.config = config
        self.rank, self.world_size = place.get_world_rank(), place.get_world_size()
        self.device = ray.train.torch.get_device()
        self.actors = EvaluationActors(actors, config.env_id, config.evaluation) if actors and self.rank == 0 else None

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
        future: Future[dict[str, Any]] = Future()
        future.set_result(evaluate(policy, self.config.env_id, self.config.evaluation, step=step))
        return future


def train_on_ray(config: RunConfig, data: ray.ObjectRef, plan: ResourcePlan, *, verbose: bool = False) -> TrainResult:
    """Trains with a `TorchTrainer` on the cluster that is joined; lost workers are replaced.

    Raises:
        UserError: what a worker ended with, if the user can mend it.
    """
    actors = EvaluationActors.start(plan.num_actors)
    run = RunFolder.of(config)
    trainer = ray.train.torch.TorchTrainer(
        _work,
        train_loop_config={"config": config, "data": data, "actors": actors, "cpus": plan.cpus_per_worker},
        scaling_config=ray.train.ScalingConfig(
            num_workers=plan.num_workers,
            use_gpu=plan.use_gpu,
            resources_per_worker={"CPU": plan.cpus_per_worker} | ({"GPU": 1} if plan.use_gpu else {}),
        ),
        run_config=ray.train.RunConfig(
            name=".ray",  # Ray Train's own files, inside the run's folder
            storage_path=str(run.folder),
            failure_config=ray.train.FailureConfig(max_failures=config.scaling.max_failures),
        ),
    )
    try:
        with quiet(verbose):
            outcome = trainer.fit().return_value
    except SystemExit:  # how Ray Train ends the driver on Ctrl-C, having aborted the workers
        raise KeyboardInterrupt from None
    finally:
        for actor in actors:
            ray.kill(actor)
    if isinstance(outcome, UserError):
        raise outcome
    assert isinstance(outcome, TrainResult)
    return outcome


def _work(settings: dict[str, Any]) -> TrainResult | UserError:
    """A worker. What the user must mend is returned, not raised: Ray Train would try it again."""
    config: RunConfig = settings["config"]
    torch.set_num_threads(max(1, int(settings["cpus"])))
    context = RayTrainContext(config, settings["actors"])
    source = ResidentSource(
        ray.get(settings["data"]), config, rank=context.rank, world_size=context.world_size, device=context.device
    )
    try:
        return run_training(config, source, context)
    except UserError as error:
        return error

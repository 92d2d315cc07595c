"""Where the loop runs: what it is told of its place among the workers, and of who runs them."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dt_ray.config import RunConfig
from dt_ray.errors import UserError
from dt_ray.evaluation import evaluate
from dt_ray.learners import Policy
from dt_ray.models.batch import WindowBatch
from dt_ray.runs import RunFolder
from dt_ray.storage import Folder


class Wish(enum.Enum):
    """What whoever runs the workers asks of them, between two updates."""

    GO_ON = enum.auto()
    SAVE = enum.auto()  # a checkpoint now: this machine may soon be gone
    STOP = enum.auto()  # a checkpoint now, and the end


class TrainContext(Protocol):
    """Where the loop runs: in this process, in a Ray Train worker or in a Tune trial."""

    rank: int
    world_size: int
    device: torch.device

    def data_parallel(self, module: nn.Module) -> nn.Module:
        """The module, its gradients averaged over the workers."""
        ...

    def sum(self, value: Tensor) -> Tensor:
        """The sum over the workers, on each of them."""
        ...

    def report(self, metrics: Mapping[str, float]) -> None:
        """Tells whoever runs the workers that a checkpoint is complete; every worker must call it."""
        ...

    def wish(self) -> Wish:
        """What is asked of the workers now: the same on all of them, who call it after every update."""
        ...

    def latest_checkpoint(self) -> Folder | None:
        """Where to go on from."""
        ...

    def evaluate(self, policy: Policy, *, step: int) -> Future[dict[str, Any]]:
        """Begins an evaluation; its report comes when the future is done."""
        ...


class LocalContext:
    """One worker, in the calling process; evaluations hold up the training."""

    rank = 0
    world_size = 1

    def __init__(self, config: RunConfig, *, device: torch.device | str = "cpu") -> None:
        self.config = config
        self.device = torch.device(device)
        self._wish = Wish.GO_ON

    def stop(self) -> None:
        """Ends the training after the update that it is in."""
        self._wish = Wish.STOP

    def wish(self) -> Wish:
        return self._wish

    def data_parallel(self, module: nn.Module) -> nn.Module:
        return module

    def sum(self, value: Tensor) -> Tensor:
        return value

    def report(self, metrics: Mapping[str, float]) -> None:
        pass  # nobody else is waiting

    def latest_checkpoint(self) -> Folder | None:
        return RunFolder.of(self.config).latest_checkpoint()[0]

    def evaluate(self, policy: Policy, *, step: int) -> Future[dict[str, Any]]:
        return evaluate_here(policy, self.config, step=step)


def evaluate_here(policy: Policy, config: RunConfig, *, step: int) -> Future[dict[str, Any]]:
    """A finished evaluation, for a context without actors."""
    future: Future[dict[str, Any]] = Future()
    try:
        report = evaluate(policy, config.env_id, config.evaluation, step=step, env_kwargs=config.env_kwargs)
    except UserError as fault:
        future.set_exception(fault)
    else:
        future.set_result(report)
    return future


def mean_real_steps(batch: WindowBatch, context: TrainContext) -> Tensor | None:
    """Real steps a worker, over all of them; None where there is one, who counts them itself."""
    if context.world_size == 1:
        return None
    if batch.num_real is not None:  # without waiting for the others, twice an update
        return batch.num_real / context.world_size
    return context.sum(batch.mask.sum()) / context.world_size

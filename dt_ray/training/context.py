"""The context of the training loop: its place among the workers, and its connection to the driver."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn

from dt_ray.config.schema import RunConfig
from dt_ray.data.held_out import HeldOutEpisodes
from dt_ray.errors import UserError
from dt_ray.learners import Policy
from dt_ray.models.batch import WindowBatch
from dt_ray.play.evaluation import evaluate
from dt_ray.play.held_out import evaluate_held_out
from dt_ray.runs.evaluation_report import EvaluationReport
from dt_ray.runs.folder import RunFolder
from dt_ray.runs.storage import Folder

T = TypeVar("T")
EXCHANGE_EVERY = 10  # updates after which several workers tell one another of stop requests and failures


class StopRequest(enum.Enum):
    """The driver's request to the training workers, between two updates."""

    NONE = enum.auto()
    SAVE = enum.auto()  # write a checkpoint now: this machine may soon be gone
    STOP = enum.auto()  # write a checkpoint now, and end
    MOVE = enum.auto()  # write a checkpoint now, and end; another number of workers goes on from it


class TrainContext(Protocol):
    """Where the loop runs: in this process, in a Ray Train worker or in a Tune trial.

    Methods with a body are those of a single worker; contexts of one worker inherit them.
    """

    config: RunConfig
    device: torch.device
    rank: int = 0
    world_size: int = 1

    def data_parallel(self, module: nn.Module) -> nn.Module:
        """The module, its gradients averaged over the workers."""
        return module

    def sum(self, value: Tensor) -> Tensor:
        """The sum over the workers, on each of them."""
        return value

    def gather(self, value: Any) -> list[Any]:
        """The values of all workers, by rank, on each of them; every worker must call it."""
        return [value]

    def report(self, metrics: Mapping[str, float]) -> None:
        """Called when a checkpoint is complete, for Ray Train; every worker must call it."""

    def report_evaluation(self, report: EvaluationReport) -> None:
        """Called by rank 0 when an evaluation and its checkpoint are written, for Ray Tune."""

    def stop_request(self) -> StopRequest:
        """The driver's present request, the same on all workers, which call it after every update."""
        ...

    def latest_checkpoint(self) -> Folder | None:
        """The checkpoint to resume from, the same on all workers; every worker must call it."""
        return RunFolder.of(self.config).latest_checkpoint()[0]

    @property
    def evaluates_here(self) -> bool:
        """Whether evaluations are played in this process."""
        return True

    def evaluate(
        self, policy: Policy, held_out: HeldOutEpisodes | None, *, step: int, again: bool = False
    ) -> Future[EvaluationReport]:
        """Begins an evaluation; its report comes when the future is done.

        `held_out` is used where there is no environment. `again` says that this evaluation was begun before and not
        finished, perhaps because the environment ended the process.
        """
        ...


class LocalContext(TrainContext):
    """One worker, in the calling process; the training waits for evaluations."""

    def __init__(self, config: RunConfig, *, device: torch.device | str = "cpu") -> None:
        self.config = config
        self.device = torch.device(device)
        self._request = StopRequest.NONE

    def stop(self) -> None:
        """Ends the training after the current update."""
        self._request = StopRequest.STOP

    def stop_request(self) -> StopRequest:
        return self._request

    def evaluate(
        self, policy: Policy, held_out: HeldOutEpisodes | None, *, step: int, again: bool = False
    ) -> Future[EvaluationReport]:
        return evaluate_here(policy, held_out, self.config, step=step)


class Failures:
    """The failure of one worker, kept until all workers know of it.

    A worker that ended alone would leave the others waiting for it. So it continues like them, and all of them end at
    the next exchange.
    """

    def __init__(self, context: TrainContext) -> None:
        self.context = context
        self.first: UserError | None = None
        self._num_updates = 0

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Keeps the `UserError` of the block; one worker alone raises it at once."""
        try:
            yield
        except UserError as error:
            if self.context.world_size == 1:
                raise
            self.first = self.first or error

    def exchange(self, *, now: bool) -> None:
        """Raises the failure of one worker on all. Called at every update; they exchange every few, or `now`."""
        self._num_updates += 1
        if self.context.world_size > 1 and (now or self._num_updates % EXCHANGE_EVERY == 0):
            failed = torch.tensor(float(self.first is not None), device=self.context.device)
            if self.context.sum(failed).item():
                self.raise_on_all()

    def raise_own(self) -> None:
        """Raises this worker's failure, once no other worker waits for it."""
        if self.first is not None:
            raise self.first

    def raise_on_all(self) -> None:
        """Raises the failure of one worker on all of them; every worker must call it."""
        for failure in self.context.gather(self.first):
            if failure is not None:
                raise failure


def together(context: TrainContext, work: Callable[[], T]) -> T:
    """Runs `work` on every worker and returns its result; a `UserError` on one worker is raised on all."""
    failures, results = Failures(context), []
    with failures.kept():
        results.append(work())
    failures.raise_on_all()
    return cast("T", results[0])


def evaluate_here(
    policy: Policy, held_out: HeldOutEpisodes | None, config: RunConfig, *, step: int
) -> Future[EvaluationReport]:
    """Evaluates in this process; the future is done when it returns."""
    future: Future[EvaluationReport] = Future()
    try:
        if config.env_id is None:
            assert held_out is not None, "without an environment nothing else can be evaluated on"
            report = evaluate_held_out(policy, held_out, config.evaluation, step=step)
        else:
            report = evaluate(policy, config.env_id, config.evaluation, step=step, env_kwargs=config.env_kwargs)
    except UserError as fault:
        future.set_exception(fault)
    else:
        future.set_result(report)
    return future


def mean_real_steps(batch: WindowBatch, context: TrainContext) -> Tensor | None:
    """The mean number of real steps per worker; None for a single worker."""
    if context.world_size == 1:
        return None
    if batch.num_real is not None:  # known without an exchange
        return batch.num_real / context.world_size
    return context.sum(batch.mask.sum()) / context.world_size

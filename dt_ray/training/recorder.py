"""Writes metrics, checkpoints, evaluations and the summary of a run when the loop says so."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dt_ray.config.schema import RunConfig
from dt_ray.errors import DivergedError, UserError
from dt_ray.learners import Learner, declaration_of
from dt_ray.losses import Metrics
from dt_ray.runs.checkpoint import checkpoint_fault, load_policy, pack_checkpoint, write_checkpoint
from dt_ray.runs.evaluation_report import EvaluationReport
from dt_ray.runs.folder import RunFolder
from dt_ray.runs.metrics import MetricsLog
from dt_ray.runs.writing import BackgroundWriter
from dt_ray.training.context import Failures, TrainContext, mean_real_steps
from dt_ray.training.resident import BatchSource
from dt_ray.training.trackers import evaluation_values, make_trackers

log = logging.getLogger("dt_ray")

NUM_VALIDATION_BATCHES = 8


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """The folder of the run, and the content of `summary.json`."""

    run: str
    summary: dict[str, Any]


class Clock:
    """Measures the seconds of a training, including those before a resume, and its speed."""

    def __init__(self, *, step: int, wall_s: float) -> None:
        self.first_step, self._wall_s_before, self._began = step, wall_s, time.perf_counter()
        self._marked_step, self._marked_at = step, self._began

    @property
    def wall_s(self) -> float:
        return self._wall_s_before + time.perf_counter() - self._began

    def updates_per_s(self, step: int, *, wall_s: float) -> float | None:
        """Updates a second since the start or the resume; None before the first update."""
        num_updates = step - self.first_step
        return num_updates / (wall_s - self._wall_s_before) if num_updates else None

    def mark(self, step: int) -> float:
        """Updates a second since the last call."""
        now = time.perf_counter()
        rate = (step - self._marked_step) / (now - self._marked_at)
        self._marked_step, self._marked_at = step, now
        return rate


class Recorder:
    """Records a run. A thread writes the files.

    All workers call the same methods: losses are means over the workers, and rank 0 writes.
    """

    def __init__(
        self,
        run: RunFolder,
        config: RunConfig,
        context: TrainContext,
        learner: Learner,
        source: BatchSource,
        failures: Failures,
        *,
        wall_s: float,
    ) -> None:
        self.run, self.config, self.context, self.learner, self.source = run, config, context, learner, source
        self.failures = failures  # failed writes are kept there
        self.clock = Clock(step=learner.step, wall_s=wall_s)
        self.log = MetricsLog(run.metrics_file, resumed_at=learner.step) if self.is_writer else None
        self.trackers = make_trackers(config, run, step=learner.step) if self.is_writer else []
        self.writer = BackgroundWriter()
        self.saving = self.writer.submit(lambda: None)  # the newest checkpoint
        self.losses: list[Tensor] = []  # since they were last checked
        self.evaluations: dict[int, Future[EvaluationReport]] = {}  # unfinished ones, by their steps
        self.failed_evaluations: dict[int, UserError] = {}  # these don't end the training
        self.written: deque[EvaluationReport] = deque()

    @property
    def is_writer(self) -> bool:
        return self.context.rank == 0

    @property
    def can_evaluate(self) -> bool:
        """Whether there is a policy, and anything to evaluate it on: an environment, or held-out episodes."""
        return declaration_of(self.config).acts and (self.config.env_id is not None or self.source.held_out is not None)

    def keep_loss(self, metrics: Metrics) -> None:
        """Keeps the loss of an update on its device, until `check_losses`."""
        self.losses.append(metrics["loss"])

    def check_losses(self) -> None:
        """Raises:
        DivergedError: one of the losses kept is not finite; the update and the last good checkpoint are named.
        """
        losses = self._mean_over_workers(torch.stack(self.losses)).tolist()
        first = self.learner.step - len(losses) + 1
        self.losses.clear()
        for step, loss in enumerate(losses, start=first):
            if not math.isfinite(loss):
                good = self.context.latest_checkpoint()
                if self.is_writer:
                    self._write_summary("diverged", self.clock.wall_s)
                way_out = f"the last good checkpoint is {good}" if good else "there is no checkpoint before it"
                raise DivergedError(
                    f"the loss became {loss} at update {step}; {way_out}. Try a lower optim.learning_rate or a tighter "
                    f"optim.gradient_clip"
                )

    def log_metrics(self, metrics: Metrics, *, validate: bool) -> None:
        """Writes a line of metrics; with `validate`, also the losses on held-out episodes."""
        rate = self.clock.mark(self.learner.step)
        tensors = {f"train/{name}": value for name, value in metrics.items()}
        if validate:
            tensors |= {f"validation/{name}": value for name, value in self._validate().items()}
        means = self._mean_over_workers(torch.stack([value.float().cpu() for value in tensors.values()]))
        if self.is_writer:
            values = dict(zip(tensors, means.tolist(), strict=True))
            values["time/updates_per_s"] = rate
            values["time/wall_s"] = self.clock.wall_s
            values["time/workers"] = self.context.world_size
            with self.failures.kept():
                self.writer.submit(partial(self._write_metrics, self.learner.step, values))

    def save(self, *, needed: bool) -> bool:
        """Writes a checkpoint and returns True on the worker that does.

        A checkpoint that is not `needed` is left out while an object store still receives the one before.
        """
        does_write = self.is_writer and (needed or self.run.folder.is_local or self.saving.done())
        if does_write:
            files = pack_checkpoint(self.learner, config=self.config, state={"train_wall_s": self.clock.wall_s})
            with self.failures.kept():
                self.writer.wait()  # at most one checkpoint is held in memory
                self.saving = self.writer.submit(partial(self._write_checkpoint, self.learner.step, files))
        self.context.report({"step": self.learner.step})
        return does_write

    def begin_evaluation(self) -> None:
        """Begins an evaluation of the present weights."""
        step = self.learner.step
        if self.is_writer and self.can_evaluate:
            if self.context.evaluates_here:
                self.writer.wait()  # if the environment ends this process, the run resumes from this checkpoint
            self.evaluations[step] = self.context.evaluate(self.learner.policy(), self.source.held_out, step=step)

    def make_up_evaluations(self, is_due: Callable[[int], bool]) -> None:
        """Begins the evaluations that a stopped run left undone, from their checkpoints."""
        if not self.is_writer or not self.can_evaluate:
            return
        for step in self.run.checkpoint_steps():
            checkpoint = self.run.checkpoint(step)
            is_undone = step <= self.learner.step and is_due(step) and not self.run.has_evaluation(step)
            if is_undone and checkpoint_fault(checkpoint) is None:
                policy, _ = load_policy(checkpoint, self.config.evaluation)
                self.evaluations[step] = self.context.evaluate(policy, self.source.held_out, step=step, again=True)

    def collect_evaluations(self, *, wait: bool = False) -> bool:
        """Writes the finished evaluations, or waits for all; returns whether there were any."""
        num_written = 0
        for step, future in list(self.evaluations.items()):
            if wait or future.done():
                del self.evaluations[step]
                try:
                    report = future.result()
                except UserError as fault:
                    log.warning("the evaluation after update %d failed: %s", step, fault)
                    self.failed_evaluations[step] = fault
                    continue
                self.writer.submit(partial(self._write_evaluation, report))
                num_written += 1
        self.writer.check()
        return num_written > 0

    def written_evaluations(self) -> Iterator[EvaluationReport]:
        """Those that were written since the last call, with their checkpoints."""
        while self.written:
            yield self.written.popleft()

    def prune_checkpoints(self) -> None:
        """Deletes old checkpoints, after everything submitted before is written.

        The newest, the best, the one that estimates recommend, the one that this process began with and those with
        unfinished evaluations are kept.
        """
        self.writer.submit(partial(self._prune, self.learner.step, spared=set(self.evaluations)))

    def hand_over(self) -> TrainResult:
        """Ends the training on these workers when their checkpoint is written; other workers resume from it."""
        self.writer.wait()
        self.failures.raise_own()
        return TrainResult(run=str(self.run), summary={})

    def stop(self) -> TrainResult:
        """Ends a run that was asked to stop; unfinished evaluations are made when it is resumed."""
        self.failures.raise_own()
        summary = self._write_summary("stopped", self.clock.wall_s) if self.is_writer else {}
        return TrainResult(run=str(self.run), summary=summary)

    def close(self) -> None:
        """Finishes all writes; also called when training ends with an error."""
        self.writer.close()
        for tracker in self.trackers:
            tracker.close()

    def finish(self) -> TrainResult:
        """Waits for unfinished evaluations and writes the summary.

        Raises:
            UserError: an evaluation failed; the training itself is finished.
        """
        wall_s = self.clock.wall_s
        if not self.is_writer:
            return TrainResult(run=str(self.run), summary={})
        self.failures.raise_own()
        if self.collect_evaluations(wait=True):
            self.prune_checkpoints()
        summary = self._write_summary("finished", wall_s)
        if self.failed_evaluations:
            step, fault = next(iter(self.failed_evaluations.items()))
            raise type(fault)(
                f"the training is finished, its checkpoint is {self.run.checkpoint(self.learner.step)}; but "
                f"{len(self.failed_evaluations)} evaluation(s) failed, the first after update {step}: {fault}. When "
                f"that is mended, evaluate it by: python -m dt_ray.train --resume {self.run}"
            )
        return TrainResult(run=str(self.run), summary=summary)

    def _write_summary(self, status: str, wall_s: float) -> dict[str, Any]:
        self.writer.wait()
        if self.log is not None:
            self.log.flush()
        rate, skipped = self.clock.updates_per_s(self.learner.step, wall_s=wall_s), self.source.num_skipped_files
        return self.run.write_summary(
            status=status,
            step=self.learner.step,
            algorithm=self.config.algorithm,
            num_parameters=sum(parameter.numel() for parameter in self.learner.model.parameters()),
            train_wall_s=round(wall_s, 3),
            updates_per_s=None if rate is None else round(rate, 3),
            **({"skipped_files": skipped} if self.config.data.on_corrupt == "skip" else {}),
        )

    def _write_metrics(self, step: int, values: Mapping[str, float]) -> None:
        if self.log is not None:
            self.log.write(step, values)
        for tracker in self.trackers:
            tracker.log(step, values)

    def _validate(self) -> Metrics:
        metrics = []
        for index in range(NUM_VALIDATION_BATCHES):
            batch = self.source.validation_batch(index)
            if batch is None:
                return {}
            metrics.append(self.learner.evaluate_loss(batch, num_real=mean_real_steps(batch, self.context)))
        return {name: torch.stack([each[name] for each in metrics]).mean() for name in metrics[0]}

    def _mean_over_workers(self, values: Tensor) -> Tensor:
        return self.context.sum(values.to(self.context.device)) / self.context.world_size

    def _write_checkpoint(self, step: int, files: Mapping[str, bytes]) -> None:
        if self.log is not None:
            self.log.flush()  # a resumed run has the metrics up to its checkpoint
        write_checkpoint(self.run.checkpoint(step), files)
        self.run.mark_latest(step)

    def _write_evaluation(self, report: EvaluationReport) -> None:
        self.run.write_evaluation(report)
        for tracker in self.trackers:
            tracker.log(report.step, evaluation_values(report))
        self.written.append(report)

    def _prune(self, step: int, *, spared: set[int]) -> None:
        chosen = self.run.best_evaluation(up_to=step), self.run.recommended_offline()
        kept = {step, self.clock.first_step} | {report.step for report in chosen if report is not None}
        self.run.prune_checkpoints(keep=self.config.checkpoint.keep, spared=spared | kept)

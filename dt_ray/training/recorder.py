"""What a run writes down while it trains, and when."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dt_ray.config.schema import RunConfig
from dt_ray.errors import DivergedError, UserError
from dt_ray.learners import Learner
from dt_ray.losses import Metrics
from dt_ray.runs.checkpoint import find_fault, load_policy, pack_checkpoint, write_checkpoint
from dt_ray.runs.evaluation_report import EvaluationReport
from dt_ray.runs.folder import MetricsLog, RunFolder
from dt_ray.runs.writing import BackgroundWriter
from dt_ray.training.context import Failures, TrainContext, mean_real_steps
from dt_ray.training.resident import BatchSource
from dt_ray.training.trackers import evaluation_values, make_trackers

log = logging.getLogger("dt_ray")

NUM_VALIDATION_BATCHES = 8


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """Where the run is, and what `summary.json` says."""

    run: str
    summary: dict[str, Any]


class Recorder:
    """Everything that a run writes down: metrics on their steps, checkpoints, evaluations and the summary."""

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
        self.failures = failures  # where those of the writer are kept
        self.is_writer = context.rank == 0
        self.log = MetricsLog(run.metrics_file, resumed_at=learner.step) if self.is_writer else None
        self.trackers = make_trackers(config, run, step=learner.step) if self.is_writer else []
        self.writer = BackgroundWriter()
        self.saving = self.writer.submit(lambda: None)  # the newest checkpoint
        self.losses: list[Tensor] = []
        self.evaluations: dict[int, Future[EvaluationReport]] = {}
        self.failed_evaluations: dict[int, UserError] = {}  # which don't end a training
        self.first_step, self.wall_s_before, self.began = learner.step, wall_s, time.perf_counter()
        self.logged_step, self.logged_at = learner.step, self.began

    @property
    def wall_s(self) -> float:
        """Seconds of training, those before a resume included."""
        return self.wall_s_before + time.perf_counter() - self.began

    @property
    def can_evaluate(self) -> bool:
        """Whether there is anything to evaluate on: an environment, or held-out episodes."""
        return self.config.env_id is not None or self.source.held_out is not None

    def is_due(self, every: int) -> bool:
        return self._is_due_at(self.learner.step, every)

    def _is_due_at(self, step: int, every: int) -> bool:
        return step == self.config.total_timesteps or (every > 0 and step > 0 and step % every == 0)

    @property
    def writes_now(self) -> bool:
        """Whether something is due at this update: the same on all workers."""
        periods = (self.config.evaluation.every, self.config.checkpoint.every, self.config.logging.every)
        return any(map(self.is_due, periods))

    def after_update(self, metrics: Metrics, *, save: bool) -> None:
        """Called by every worker after every update; what is due is the same on all of them."""
        config = self.config
        self.losses.append(metrics["loss"])
        evaluating = self.is_due(config.evaluation.every)
        saving = save or evaluating or self.is_due(config.checkpoint.every)
        if self.is_due(config.logging.every) or saving:
            self._check_losses()
        if self.is_due(config.logging.every):
            self._log_metrics(metrics, validating=evaluating)
        if saving:
            self._save(needed=save or evaluating or self.learner.step == config.total_timesteps)
        with self.failures.kept():
            if evaluating:
                self.evaluate()
            self._collect_evaluations(lambda future: future.done())
            self.writer.check()

    def evaluate(self) -> None:
        """Begins an evaluation of the present weights."""
        step = self.learner.step
        if self.is_writer and self.can_evaluate:
            if self.context.evaluates_here:
                self.writer.wait()  # should the environment end this process, its successor goes on from here
            self.evaluations[step] = self.context.evaluate(self.learner.policy(), self.source.held_out, step=step)

    def make_up_evaluations(self) -> None:
        """Begins those that a run which stopped left undone, from the checkpoints that waited for them."""
        if not self.is_writer or not self.can_evaluate:
            return
        every, done = self.config.evaluation.every, self.learner.step
        undone = [step for step in self.run.checkpoint_steps() if step <= done and self._is_due_at(step, every)]
        for step in undone:
            checkpoint = self.run.checkpoint(step)
            if not self.run.has_evaluation(step) and find_fault(checkpoint) is None:
                policy, _ = load_policy(checkpoint, self.config.evaluation)
                self.evaluations[step] = self.context.evaluate(policy, self.source.held_out, step=step, again=True)

    def hand_over(self) -> TrainResult:
        """Ends these workers once their checkpoint is written; others go on from it."""
        self.writer.wait()
        self.failures.raise_own()
        return TrainResult(run=str(self.run), summary={})

    def stop(self) -> TrainResult:
        """Leaves the run as it is; what is still being evaluated is evaluated when it goes on."""
        self.failures.raise_own()
        summary = self._write_summary("stopped", self.wall_s) if self.is_writer else {}
        return TrainResult(run=str(self.run), summary=summary)

    def close(self) -> None:
        """Writes what is still to be written, also where training ends with an error."""
        self.writer.close()
        for tracker in self.trackers:
            tracker.close()

    def finish(self) -> TrainResult:
        """Waits for the evaluations under way and writes the summary.

        Raises:
            UserError: what an evaluation ended with; the training is finished.
        """
        wall_s = self.wall_s
        if not self.is_writer:
            return TrainResult(run=str(self.run), summary={})
        self.failures.raise_own()
        self._collect_evaluations(lambda future: True)
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
        num_updates, skipped = self.learner.step - self.first_step, self.source.num_skipped_files
        return self.run.write_summary(
            status=status,
            step=self.learner.step,
            algorithm=self.config.algorithm,
            num_parameters=sum(parameter.numel() for parameter in self.learner.model.parameters()),
            train_wall_s=round(wall_s, 3),
            updates_per_s=round(num_updates / (wall_s - self.wall_s_before), 3) if num_updates else None,
            **({"skipped_files": skipped} if self.config.data.on_corrupt == "skip" else {}),
        )

    def _check_losses(self) -> None:
        losses = self._mean_over_workers(torch.stack(self.losses)).tolist()
        first = self.learner.step - len(losses) + 1
        self.losses.clear()
        for step, loss in enumerate(losses, start=first):
            if not math.isfinite(loss):
                good = self.context.latest_checkpoint()
                if self.is_writer:
                    self._write_summary("diverged", self.wall_s)
                way_out = f"the last good checkpoint is {good}" if good else "there is no checkpoint before it"
                raise DivergedError(
                    f"the loss became {loss} at update {step}; {way_out}. Try a lower optim.learning_rate or a tighter "
                    f"optim.gradient_clip"
                )

    def _log_metrics(self, metrics: Metrics, *, validating: bool) -> None:
        step, now = self.learner.step, time.perf_counter()
        tensors = {f"train/{name}": value for name, value in metrics.items()}
        if validating:
            tensors |= {f"validation/{name}": value for name, value in self._validate().items()}
        means = self._mean_over_workers(torch.stack([value.float().cpu() for value in tensors.values()]))
        if self.log is not None:
            values = dict(zip(tensors, means.tolist(), strict=True))
            values["time/updates_per_s"] = (step - self.logged_step) / (now - self.logged_at)
            values["time/wall_s"] = self.wall_s
            values["time/workers"] = self.context.world_size
            with self.failures.kept():
                self.writer.submit(partial(self._write_metrics, step, values))
        self.logged_step, self.logged_at = step, now

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

    def _save(self, *, needed: bool) -> None:
        """A checkpoint, unless an object store still takes the one before and nothing depends on this one."""
        if self.is_writer and (needed or self.run.folder.is_local or self.saving.done()):
            files = pack_checkpoint(self.learner, config=self.config, state={"train_wall_s": self.wall_s})
            with self.failures.kept():
                self.writer.wait()  # at most one checkpoint is held in memory
                write = partial(self._write_checkpoint, self.learner.step, files, spared=set(self.evaluations))
                self.saving = self.writer.submit(write)
        self.context.report({"step": self.learner.step})

    def _write_checkpoint(self, step: int, files: Mapping[str, bytes], *, spared: set[int]) -> None:
        if self.log is not None:
            self.log.flush()  # a resumed run has the metrics up to its checkpoint
        write_checkpoint(self.run.checkpoint(step), files)
        self.run.mark_latest(step)
        self._prune(step, spared)

    def _collect_evaluations(self, is_wanted: Callable[[Future[EvaluationReport]], bool]) -> None:
        for step, future in list(self.evaluations.items()):
            if is_wanted(future):
                del self.evaluations[step]
                try:
                    report = future.result()
                except UserError as fault:
                    log.warning("the evaluation after update %d failed: %s", step, fault)
                    self.failed_evaluations[step] = fault
                    continue
                spared = set(self.evaluations)
                self.writer.submit(partial(self._write_evaluation, self.learner.step, report, spared=spared))

    def _write_evaluation(self, step: int, report: EvaluationReport, *, spared: set[int]) -> None:
        self.run.write_evaluation(report)
        for tracker in self.trackers:
            tracker.log(report.step, evaluation_values(report))
        self._prune(step, spared)

    def _prune(self, step: int, spared: set[int]) -> None:
        """Deletes old checkpoints at update `step`.

        The newest, the best, the one that this process began with and those that wait for their evaluation are kept.
        """
        best = self.run.best_evaluation(up_to=step)
        kept = {step, self.first_step} | ({best.step} if best else set())
        self.run.prune_checkpoints(keep=self.config.checkpoint.keep, spared=spared | kept)

"""Runs one trial of a sweep, in a process of Ray Tune, or with a trainer of several workers."""

from __future__ import annotations

import logging
import math
import os
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import ray
import ray.tune
import torch
from pyarrow import fs

from dt_ray.config.schema import BATCH_SETTINGS, RunConfig
from dt_ray.data.filesystems import reach
from dt_ray.data.held_out import HeldOutEpisodes
from dt_ray.distributed.evaluation import EvaluationActors
from dt_ray.distributed.preparing import SharedData
from dt_ray.distributed.resources import ResourcePlan
from dt_ray.distributed.training import train_on_ray
from dt_ray.errors import StorageError, UserError
from dt_ray.learners import Policy, check_settings, declaration_of, return_source_of
from dt_ray.runs.checkpoint import checkpoint_fault, read_facts
from dt_ray.runs.evaluation_report import EvaluationReport
from dt_ray.runs.folder import RunFolder
from dt_ray.runs.storage import Folder
from dt_ray.sweeps.config import SweepConfig
from dt_ray.sweeps.folder import SweepFolder
from dt_ray.training.context import StopRequest, TrainContext, evaluate_here
from dt_ray.training.interrupts import StoppedEarlyError
from dt_ray.training.loop import run_training
from dt_ray.training.preparing import make_source
from dt_ray.training.recorder import TrainResult

log = logging.getLogger("dt_ray")

POLL_S = 0.5
ENDS_WITHIN_S = 60  # the time for the last checkpoint of a trial that is ended early; Tune's default is 2


class TrialContext(TrainContext):
    """A trial of one worker in a process of Ray Tune. Tune gets its evaluations, and may end it when it gets one."""

    def __init__(self, config: RunConfig, sweep: SweepConfig, *, device: str) -> None:
        self.config, self.sweep, self.device = config, sweep, torch.device(device)
        self.hands_on = sweep.settings.scheduler == "pbt"  # its checkpoints to other trials
        self.is_ended = False
        self._taken_over: Folder | None = None
        self._reported = 0

    def report_evaluation(self, report: EvaluationReport) -> None:
        """Tells Tune of an evaluation; the last one is reported by `train_trial`, as the trial's end."""
        if self.is_ended or not self._reported < report.step < self.config.total_timesteps:
            return
        self._reported = report.step
        try:
            self._tell_tune(report)
        except SystemExit:  # how Tune ends a trial, in its call to `report`
            self.is_ended = True

    def _tell_tune(self, report: EvaluationReport) -> None:
        metrics = metrics_of(report, self.sweep)
        if not self.hands_on:
            ray.tune.report(metrics)
            return
        with tempfile.TemporaryDirectory() as copy:  # the run's own may be pruned while Tune reads them
            checkpoint = RunFolder.of(self.config).checkpoint(report.step)
            if (fault := copy_checkpoint(checkpoint, copy)) is not None:
                log.warning("update %d is not reported to the population: %s", report.step, fault)
                return
            ray.tune.report(metrics, checkpoint=ray.tune.Checkpoint.from_directory(copy))

    def stop_request(self) -> StopRequest:
        return StopRequest.STOP if self.is_ended else StopRequest.NONE

    def latest_checkpoint(self) -> Folder | None:
        """The checkpoint of a better trial if Tune gives one; later checkpoints of this trial are then deleted."""
        run = RunFolder.of(self.config)
        given = ray.tune.get_checkpoint() if self.hands_on else None
        if given is None:
            return run.latest_checkpoint()[0]
        if self._taken_over is None:
            self._download = tempfile.TemporaryDirectory(prefix="dt_ray-checkpoint-")  # until the trial ends
            self._taken_over = local_copy(given, self._download.name)
            run.discard_after(read_facts(self._taken_over).step)
        return self._taken_over

    def evaluate(
        self, policy: Policy, held_out: HeldOutEpisodes | None, *, step: int, again: bool = False
    ) -> Future[EvaluationReport]:
        config = self.config
        if not again or config.env_id is None:
            return evaluate_here(policy, held_out, config, step=step)
        # The environment may have ended the process before this one.
        actors = EvaluationActors.start(1, num_cpus=0)
        return EvaluationActors(actors, config.env_id, config.evaluation, config.env_kwargs).submit(policy, step=step)


def copy_checkpoint(checkpoint: Folder, target: str) -> str | None:
    """Copies a checkpoint into a local folder; returns why the copy is not complete, or None."""
    filesystem, path = reach(checkpoint.uri)
    with suppress(FileNotFoundError):  # pruned meanwhile
        fs.copy_files(path, target, source_filesystem=filesystem, destination_filesystem=fs.LocalFileSystem())
    return checkpoint_fault(Folder(target))


def local_copy(checkpoint: ray.tune.Checkpoint, target: str) -> Folder:
    """Tune's checkpoint as a local folder: the one that it is, or `target`, which it is downloaded to."""
    if isinstance(checkpoint.filesystem, fs.LocalFileSystem):
        return Folder(checkpoint.path)
    return Folder(checkpoint.to_directory(target))


def metrics_of(report: EvaluationReport, sweep: SweepConfig) -> dict[str, float]:
    """The numbers by which Tune compares trials: the highest mean return, the obedience error and the score.

    Without an environment it is the error of the actions.
    """
    if report.held_out is not None:
        return {"step": report.step, "action_error": report.held_out.action_error}
    scores = [target.normalized_score for target in report.targets if target.normalized_score is not None]
    return {
        "step": report.step,
        "return_mean": report.highest_mean,
        "obedience_error": report.obedience_error,
        **({"normalized_score": max(scores)} if scores else {}),
    }


def train_trial(
    drawn: dict[str, Any], *, sweep: SweepConfig, layouts: Mapping[tuple[Any, ...], SharedData], cpus: float
) -> None:
    """One trial, from its newest checkpoint if it has one."""
    os.environ["TUNE_FUNCTION_THREAD_TIMEOUT_S"] = str(ENDS_WITHIN_S)  # read in this process
    folder = SweepFolder.of(sweep)
    chosen = dict(drawn)
    if (name := chosen.pop("trial", None)) is not None:
        chosen = sweep.trials()[name]
    else:
        name = ray.tune.get_context().get_trial_id()
        if (index := chosen.pop("__trial_index__", None)) is not None:
            chosen["seed"] = sweep.seeds[index]
    run = folder.trial(name)
    try:
        config = sweep.run_config(name, chosen, storage_path=str(folder.trials))
        check_settings(config, every_section=False)
        run.write_config(config)
        data = layouts[layout_key(config)]
        train = _train_with_workers if config.scaling.max_workers > 1 else _train_here
        report = EvaluationReport.from_dict(train(config, sweep, data, cpus).summary["last"])
        # Without `done`, population-based training might restart the finished trial from another one's checkpoint.
        ray.tune.report({**metrics_of(report, sweep), "done": True})
    except StorageError:  # Tune tries again
        raise
    except UserError as error:  # another attempt would fail in the same way
        note_failure(run, error)
        worst = -math.inf if sweep.settings.direction == "max" else math.inf
        ray.tune.report({"step": sweep.base.total_timesteps, sweep.settings.metric: worst})


def _train_here(config: RunConfig, sweep: SweepConfig, data: SharedData, cpus: float) -> TrainResult:
    torch.set_num_threads(max(1, min(int(cpus), os.cpu_count() or 1)))
    context = TrialContext(config, sweep, device="cuda" if config.scaling.use_gpu else "cpu")
    source = make_source(data.fetch(), config, device=context.device)
    result = run_training(config, source, context)
    if context.is_ended:
        sys.exit(0)  # as Tune's `report` would have
    return result


def _train_with_workers(config: RunConfig, sweep: SweepConfig, data: SharedData, cpus: float) -> TrainResult:
    """Starts a trainer of several workers, and reports its evaluations to Tune."""
    run, ended = RunFolder.of(config), threading.Event()

    @contextmanager
    def reporting(ask: Callable[[], object]) -> Iterator[None]:
        finished = threading.Event()

        def watch() -> None:
            reported: set[int] = set()
            while not finished.wait(POLL_S):
                steps = {step for step in run.checkpoint_steps() if run.has_evaluation(step)} - reported
                for step in sorted(steps - {config.total_timesteps}):
                    reported.add(step)
                    try:
                        ray.tune.report(metrics_of(run.read_evaluation(step), sweep))
                    except SystemExit:
                        ended.set()
                        ask()
                        return

        watcher = threading.Thread(target=watch, daemon=True, name="reports")
        watcher.start()
        try:
            yield
        except StoppedEarlyError:
            if ended.is_set():
                sys.exit(0)
            raise
        finally:
            finished.set()
            watcher.join()

    plan = ResourcePlan(
        num_workers=config.scaling.max_workers, cpus_per_worker=cpus, use_gpu=config.scaling.use_gpu, num_actors=0
    )
    result = train_on_ray(config, data, plan, stopping=reporting)
    if ended.is_set():
        sys.exit(0)
    return result


def layout_key(config: RunConfig) -> tuple[Any, ...]:
    """The settings that decide how data is laid out. Runs with one key share data, for their longest window."""
    data = replace(config.data, **BATCH_SETTINGS, window_length=None)
    seed = config.seed if data.validation_fraction > 0 else None  # it says only which episodes are held out
    declared = declaration_of(config)
    source = return_source_of(config)
    return repr(data), source, declared.returns, seed, config.model.max_timesteps, config.model.clamp_timesteps


def note_failure(run: RunFolder, error: BaseException) -> None:
    """Writes `error.txt` into a trial's folder: what ended the trial."""
    (run.folder / "error.txt").write_text(f"{str(error).strip()}\n")

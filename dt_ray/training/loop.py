"""The only training loop. It knows where it runs, and its place among the workers, from a `TrainContext` alone."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass

from dt_ray.config.modules import allow_modules
from dt_ray.config.schema import RunConfig
from dt_ray.data.normalizer import Normalizer
from dt_ray.data.spaces import SpaceSpec
from dt_ray.learners import make_learner
from dt_ray.learners.acceleration import keep_memory
from dt_ray.models.batch import WindowBatch
from dt_ray.models.state_values import StateValues
from dt_ray.runs.checkpoint import restore_learner
from dt_ray.runs.folder import RunFolder
from dt_ray.runs.storage import Folder
from dt_ray.training.context import Failures, StopRequest, TrainContext, mean_real_steps, together
from dt_ray.training.recorder import Recorder, TrainResult
from dt_ray.training.resident import BatchSource


@dataclass(frozen=True, kw_only=True)
class Due:
    """What is due after an update, by the configuration: the same on all workers. After the last update all is due."""

    log: bool
    save: bool
    evaluate: bool

    @classmethod
    def after(cls, step: int, config: RunConfig) -> Due:
        def is_due(every: int) -> bool:
            return step == config.total_timesteps or (every > 0 and step > 0 and step % every == 0)

        evaluate = is_due(config.evaluation.every)  # always of a checkpoint
        return cls(
            log=is_due(config.logging.every), save=evaluate or is_due(config.checkpoint.every), evaluate=evaluate
        )


def check_checkpoint(
    checkpoint: Folder, config: RunConfig, spec: SpaceSpec, normalizer: Normalizer, values: StateValues | None
) -> None:
    """Loads a checkpoint as `run_training` will, so that a run which can't be resumed is refused before it is changed.

    Raises:
        RunError: the checkpoint is of another run, of another model or in other units.
        ConfigError: the settings don't fit together.
    """
    allow_modules(config.algorithm, config.env_id)  # as `run_training` does
    learner, _ = make_learner(config, spec, normalizer, values)
    restore_learner(checkpoint, learner)


def run_training(config: RunConfig, source: BatchSource, context: TrainContext) -> TrainResult:
    """Trains until `total_timesteps` updates are made, from the latest checkpoint if there is one.

    Raises:
        DivergedError: the loss is no longer finite; the update and the last good checkpoint are named.
        RunError: the checkpoint is of another run.
        StorageError: a checkpoint can't be read or written.
        UserError: the failure of one worker, raised on all of them.
    """
    keep_memory()
    allow_modules(config.algorithm, config.env_id)  # the user has chosen them by starting the run
    run = RunFolder.of(config)
    learner, config = make_learner(
        config,
        source.spec,
        source.normalizer,
        source.values,
        device=context.device,
        data_parallel=context.data_parallel,
        rank=context.rank,
    )
    checkpoint = context.latest_checkpoint()
    state = together(context, lambda: {} if checkpoint is None else restore_learner(checkpoint, learner))
    wall_s, failures = state.get("train_wall_s", 0.0), Failures(context)
    recorder = together(context, lambda: Recorder(run, config, context, learner, source, failures, wall_s=wall_s))
    with closing(recorder):
        together(context, lambda: recorder.make_up_evaluations(lambda step: Due.after(step, config).evaluate))
        batch: WindowBatch | None = None
        while learner.step < config.total_timesteps:
            batch = _next_batch(source, learner.step, batch, failures)
            metrics = learner.update(batch, num_real=mean_real_steps(batch, context))
            recorder.keep_loss(metrics)
            due = Due.after(learner.step, config)
            failures.exchange(now=due.log or due.save)
            for report in recorder.written_evaluations():
                context.report_evaluation(report)
            request = context.stop_request()
            saves = due.save or request is not StopRequest.NONE
            if due.log or saves:
                recorder.check_losses()
            if due.log:
                recorder.log_metrics(metrics, validate=due.evaluate)
            saved = saves and recorder.save(needed=due.evaluate or request is not StopRequest.NONE)
            with failures.kept():
                if due.evaluate:
                    recorder.begin_evaluation()
                if recorder.collect_evaluations() or saved:
                    recorder.prune_checkpoints()
            if request is StopRequest.MOVE:
                return recorder.hand_over()
            if request is StopRequest.STOP and learner.step < config.total_timesteps:
                return recorder.stop()
        return recorder.finish()


def _next_batch(source: BatchSource, step: int, before: WindowBatch | None, failures: Failures) -> WindowBatch:
    """The batch of an update. A worker that has failed reuses its last batch until the others know of the failure."""
    if before is None:
        return together(failures.context, lambda: source.batch(step))
    if failures.first is None:
        with failures.kept():
            return source.batch(step)
    return before

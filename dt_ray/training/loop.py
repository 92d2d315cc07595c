"""The training loop: the only one, whoever runs it. It knows its place among the workers only by a `TrainContext`."""

from __future__ import annotations

from contextlib import closing

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
from dt_ray.training.context import Failures, TrainContext, Wish, mean_real_steps, together
from dt_ray.training.recorder import Recorder, TrainResult
from dt_ray.training.resident import BatchSource


def check_checkpoint(
    checkpoint: Folder, config: RunConfig, spec: SpaceSpec, normalizer: Normalizer, values: StateValues | None
) -> None:
    """Loads a checkpoint as `run_training` will, so that a run which can't go on is refused before it is touched.

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
        UserError: what one worker ended with, on all of them.
    """
    keep_memory()
    allow_modules(config.algorithm, config.env_id)  # who starts a run has chosen them, also for its own checkpoints
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
        together(context, recorder.make_up_evaluations)
        batch: WindowBatch | None = None
        while learner.step < config.total_timesteps:
            batch = _next_batch(source, learner.step, batch, failures)
            metrics = learner.update(batch, num_real=mean_real_steps(batch, context))
            failures.exchange(now=recorder.writes_now)
            wish = context.wish()
            recorder.after_update(metrics, save=wish is not Wish.GO_ON)
            if wish is Wish.MOVE:
                return recorder.hand_over()
            if wish is Wish.STOP and learner.step < config.total_timesteps:
                return recorder.stop()
        return recorder.finish()


def _next_batch(source: BatchSource, step: int, before: WindowBatch | None, failures: Failures) -> WindowBatch:
    """The batch of an update; of a worker that has failed the batch before, until the others know."""
    if before is None:
        return together(failures.context, lambda: source.batch(step))
    if failures.first is None:
        with failures.kept():
            return source.batch(step)
    return before

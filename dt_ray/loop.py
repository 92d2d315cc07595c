"""The training loop: the only one, whoever runs it. It knows its place among the workers only by a `TrainContext`."""

from __future__ import annotations

from contextlib import closing

from dt_ray.checkpoint import restore_learner
from dt_ray.config import RunConfig
from dt_ray.context import TrainContext, Wish, mean_real_steps
from dt_ray.learners import make_learner
from dt_ray.learners.acceleration import keep_memory
from dt_ray.modules import allow_modules
from dt_ray.recording import Recorder, TrainResult
from dt_ray.runs import RunFolder
from dt_ray.sources import BatchSource


def run_training(config: RunConfig, source: BatchSource, context: TrainContext) -> TrainResult:
    """Trains until `total_timesteps` updates are made, from the latest checkpoint if there is one.

    Raises:
        DivergedError: the loss is no longer finite; the update and the last good checkpoint are named.
        RunError: the checkpoint is of another run.
        StorageError: a checkpoint can't be read or written.
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
    state = {} if checkpoint is None else restore_learner(checkpoint, learner)
    recorder = Recorder(run, config, context, learner, source, wall_s=state.get("train_wall_s", 0.0))
    with closing(recorder):
        recorder.make_up_evaluations()
        while learner.step < config.total_timesteps:
            batch = source.batch(learner.step)
            metrics = learner.update(batch, num_real=mean_real_steps(batch, context))
            wish = context.wish()
            recorder.after_update(metrics, save=wish is not Wish.GO_ON)
            if wish is Wish.STOP and learner.step < config.total_timesteps:
                return recorder.stop()
        return recorder.finish()

"""Estimates what a run's policy will reach from the log alone, in a world model that is trained when needed."""

from __future__ import annotations

import logging
import math
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

from dt_ray.config.loading import read_settings, to_plain
from dt_ray.config.modules import check_names
from dt_ray.config.schema import BATCH_SETTINGS, DataConfig, EvaluationConfig, OptimConfig, RunConfig
from dt_ray.data.spaces import SpaceSpec
from dt_ray.errors import ConfigError, RunError, UserError
from dt_ray.jobs.deriving import resolve_settings
from dt_ray.jobs.training import (
    Watch,
    one_connection,
    read_held_out,
    resume_run,
    start_run,
    with_absolute_paths,
)
from dt_ray.learners import declaration_of
from dt_ray.learners.world_model import WorldModelLearner
from dt_ray.offline.estimates import World, estimate_returns
from dt_ray.runs.checkpoint import checkpoint_fault, load_learner, load_policy, read_facts
from dt_ray.runs.folder import RunFolder, checkpoint_at, run_of
from dt_ray.runs.offline_report import OfflineReport
from dt_ray.runs.storage import Folder
from dt_ray.training.recorder import TrainResult

log = logging.getLogger("dt_ray")

NEUTRAL = "world_model/neutral"
UPDATES_PER_UPDATE = 2.4  # of the world model for one of the policy, at most: they take about as long


def is_estimated(config: RunConfig) -> bool:
    """Whether a training ends with an estimate from the log."""
    if not declaration_of(config).acts:
        return False
    return config.env_id is None if config.evaluation.offline is None else config.evaluation.offline


def train_and_estimate(
    config: RunConfig, *, resume: bool = False, watch: Watch = nullcontext, **options: Any
) -> tuple[TrainResult, OfflineReport | None]:
    """Starts or resumes a run, and estimates what its policy will reach where `evaluation.offline` says so.

    Raises:
        UserError: as `start_run` and `resume_run`.
    """
    shown = {name: options[name] for name in ("verbose", "dashboard") if name in options}
    wanted = is_estimated(config)
    with one_connection(config, needed=wanted, **shown):
        if resume:
            with watch(config):
                result = resume_run(config, **options)
        else:
            result = start_run(config, watch=watch, **options)
        if result.summary.get("status") != "finished" or not wanted:
            return result, None
        return result, _estimate_finished(config, result.summary["step"], watch=watch, **options)


def _estimate_finished(config: RunConfig, step: int, *, watch: Watch, **options: Any) -> OfflineReport | None:
    """The estimates for a training that has finished; what prevents them is said, and fails nothing.

    Without an environment the earlier checkpoints that are kept are estimated too, and those of the recommended one are
    returned.
    """
    run = RunFolder.of(config)
    last, earlier = run.read_offline(step), _earlier_checkpoints(run, step) if config.env_id is None else []
    try:
        if last is None or earlier:
            shown = {"overwrite": options.get("overwrite", False), "verbose": options.get("verbose", False)}
            world = _world_for(run.checkpoint(step), config, None, watch=watch, **shown)
            last = last or estimate_in(world, run.checkpoint(step))
            for checkpoint in earlier:
                _estimate_earlier(world, checkpoint, last)
    except UserError as error:
        log.warning("the training is finished; what its policy will reach was not estimated: %s", error)
        return None
    run.renew_summary()
    return run.recommended_offline() or last


def _earlier_checkpoints(run: RunFolder, step: int) -> list[Folder]:
    """The complete checkpoints before a step that have no estimates."""
    missing = [
        run.checkpoint(each) for each in run.checkpoint_steps() if each < step and run.read_offline(each) is None
    ]
    return [checkpoint for checkpoint in missing if checkpoint_fault(checkpoint) is None]


def _estimate_earlier(world: World, checkpoint: Folder, last: OfflineReport) -> None:
    """Estimates an earlier checkpoint, at the target return only that is recommended for the last one, if one is."""
    evaluation = read_facts(checkpoint).evaluation
    if last.best_target is not None:
        evaluation = replace(evaluation, target_returns=(last.best_target,))
    estimate_in(world, checkpoint, evaluation, explores=False)


def estimate_run(
    checkpoint: Folder,
    *,
    evaluation: EvaluationConfig | None = None,
    log_path: str | None = None,
    watch: Watch = nullcontext,
    verbose: bool = False,
) -> OfflineReport:
    """Estimates what a checkpoint's policy will reach, and writes the report into its run if it lies in one.

    `log_path` is another log than the one it was trained on.

    Raises:
        ConfigError: the log has other observations or actions than the policy, or no episode to hold out.
        RunError: there is no complete checkpoint, or a world model of other settings has the name that is needed.
    """
    run = run_of(checkpoint)
    config = run.read_config() if run is not None else load_learner(checkpoint)[1]
    check_names(config.named_code, source=str(run or checkpoint))
    num_workers = 1 if config.data.needs_ray and log_path is None else 0
    config = replace(config, scaling=replace(config.scaling, num_workers=num_workers))
    world = _world_for(checkpoint, config, log_path, watch=watch, verbose=verbose)
    return estimate_in(world, checkpoint, evaluation)


def _world_for(checkpoint: Folder, config: RunConfig, log_path: str | None, **options: Any) -> World:
    """The world model for a checkpoint of a run with this configuration."""
    run = run_of(checkpoint)
    place = checkpoint if run is None else run.folder
    if run is not None and run.folder.parent.name == "trials":
        place = run.folder.parent.parent  # the sweep: its trials share a world model
    return load_world(world_checkpoint(config, place, log_path, **options), read_facts(checkpoint).spec)


def estimate_in(
    world: World, checkpoint: Folder, evaluation: EvaluationConfig | None = None, *, explores: bool = True
) -> OfflineReport:
    """`estimate_run` in a world model that was loaded for the checkpoint's spaces."""
    policy, facts = load_policy(checkpoint, evaluation)
    log.info("estimating returns after %d updates in the world model %s", facts.step, world.place)
    report = estimate_returns(policy, world, evaluation or facts.evaluation, step=facts.step, explores=explores)
    if (run := run_of(checkpoint)) is not None:
        run.write_offline(report)
    return report


def world_checkpoint(
    config: RunConfig,
    place: Folder,
    log_path: str | None,
    *,
    overwrite: bool = False,
    watch: Watch = nullcontext,
    verbose: bool = False,
) -> Folder:
    """The newest checkpoint of the world model for a run; it is trained first, or resumed, where it isn't finished.

    Raises:
        RunError: one of another log has its name, which may not be replaced without `overwrite`.
    """
    if config.evaluation.world_model is not None and log_path is None:
        return checkpoint_at(Folder.at(config.evaluation.world_model))
    wanted = world_config(config, place, log_path)
    run = RunFolder.of(wanted)
    found = run.read_config() if run.folder.exists() and not overwrite else None
    if found is None:
        log.info("training a world model of the log, for estimates without an environment")
        start_run(wanted, overwrite=overwrite, watch=watch, verbose=verbose)
    elif _log_of(found) != _log_of(wanted):
        raise RunError(
            f"{run} is a world model of another log, or of this one read otherwise; delete it, or name the world model "
            f"to use: evaluation.world_model=RUN"
        )
    elif (run.read_summary() or {}).get("status") != "finished":
        with watch(found):
            resume_run(replace(found, scaling=wanted.scaling), verbose=verbose)
    return checkpoint_at(run.folder)


def _log_of(config: RunConfig) -> DataConfig:
    """Which log is read, and how: without what is derived from it and where it is held."""
    usual = DataConfig()
    names = ("validation_fraction", "return_scale", "action_bounds", "memory_mb", "residency", "on_corrupt")
    return replace(config.data, **{name: getattr(usual, name) for name in names})


def world_config(config: RunConfig, place: Folder, log_path: str | None = None) -> RunConfig:
    """The configuration of the world model beside the run at `place`, of all of its log or of another one.

    Raises:
        UserError: the log can't be read.
    """
    ending = "world" if log_path is None else f"world-{Folder.at(log_path).name.partition('.')[0]}"
    data = to_plain(world_data(config.data, log_path))
    neutral = read_settings(NEUTRAL, [])
    tree = {
        **neutral,
        **{key: value for key, value in to_plain(config).items() if key in ("env_id", "env_kwargs", "seed", "scaling")},
        "name": f"{place.name}-{ending}",
        "storage_path": place.parent.uri,
        "data": {**data, "return_scale": neutral["data"]["return_scale"]},
        "evaluation": {**neutral["evaluation"], "max_timesteps": config.evaluation.max_timesteps},
    }
    if config.data.validation_fraction == 0:
        tree["data"]["validation_fraction"] = neutral["data"]["validation_fraction"]
    found = resolve_settings(tree).config
    most = math.ceil(UPDATES_PER_UPDATE * config.total_timesteps)
    return replace(found, total_timesteps=min(found.total_timesteps, most))


def load_world(checkpoint: Folder, spec: SpaceSpec) -> World:
    """The world model of a checkpoint, tried on its held-out episodes, for policies with these spaces.

    Raises:
        ConfigError: it is of another algorithm, its spaces are others, or no episode was held out.
    """
    learner, config = load_learner(checkpoint, optim=OptimConfig())
    if not isinstance(learner, WorldModelLearner):
        raise ConfigError(f"{checkpoint} is a checkpoint of {config.algorithm}, not of a world model")
    mine, theirs = ((each.observation_dim, each.action_dim) for each in (spec, learner.spec))
    if mine != theirs:
        raise ConfigError(
            f"the policy has {mine[0]} observation and {mine[1]} action dimensions, the log of the world model "
            f"{checkpoint} has {theirs[0]} and {theirs[1]}"
        )
    held_out = read_held_out(config)
    return World.of(learner.model, learner.normalizer, held_out, place=str(checkpoint), log=config.data.paths)


def world_data(data: DataConfig, log_path: str | None) -> DataConfig:
    """How the log is read: all of its episodes, with the returns of their rewards, discounted as the policy's are."""
    everything: dict[str, Any] = {
        **BATCH_SETTINGS,
        "max_episodes": None,
        "top_fraction": 1.0,
        "return_source": "rewards",
        "values": None,
        "return_scale": None,
        "window_length": None,
        "collect": None,
    }
    if log_path is not None:
        everything |= {"path": log_path, "mix": {}, "format": None, "residency": "auto"}
    return with_absolute_paths(replace(data, **everything))

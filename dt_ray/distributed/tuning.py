"""Runs sweeps on Ray Tune: the trials, their search and scheduling, and the data that they share."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import ray
import ray.exceptions
import ray.tune
import torch
from ray.tune.schedulers import ASHAScheduler, MedianStoppingRule, PopulationBasedTraining, TrialScheduler
from ray.tune.search import Searcher

from dt_ray.config.modules import allow_modules, allowed_modules, check_names
from dt_ray.config.schema import BATCH_SETTINGS, EvaluationConfig, RunConfig
from dt_ray.data.spaces import SpaceSpec, needed_environment
from dt_ray.distributed.cluster import quiet
from dt_ray.distributed.evaluation import EvaluationActors
from dt_ray.distributed.preparing import SharedData, check_checkpoint_on_ray, prepare_layouts
from dt_ray.distributed.requests import release_requests
from dt_ray.distributed.resources import TRIAL_CPUS, TrialPlan, worker_bundle
from dt_ray.distributed.trials import layout_key, note_failure, train_trial
from dt_ray.distributed.usage import saying_when_full
from dt_ray.errors import ConfigError, UserError
from dt_ray.learners import window_length_of
from dt_ray.runs.checkpoint import load_policy
from dt_ray.runs.evaluation_report import EvaluationReport
from dt_ray.runs.folder import RunFolder, with_values_checkpoint
from dt_ray.runs.storage import Folder
from dt_ray.sweeps.config import ESTIMATE, Axis, SweepConfig, configure
from dt_ray.sweeps.folder import SweepFolder, evaluate_checkpoint, further_evaluations, result_of

log = logging.getLogger("dt_ray")

TUNE_SETTINGS = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # a run writes its own metrics
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "RAY_AIR_NEW_OUTPUT": "0",  # which prints whatever `verbose` says
}
MAX_FAILURES = 3  # lost processes that a trial survives
DATA_KEYS_READ_LATER = tuple(f"data.{name}" for name in BATCH_SETTINGS)


def tune_on_ray(
    sweep: SweepConfig,
    spec: SpaceSpec,
    plan: TrialPlan,
    prepare_folder: Callable[[], None],
    *,
    resume: bool = False,
    verbose: bool = False,
) -> None:
    """Trains and evaluates all trials of a sweep on the cluster that is joined; results are in their run folders.

    Raises:
        UserError: no trial can be run: the data is unsound.
    """
    folder = SweepFolder.of(sweep)
    scaling, cpus = sweep.base.scaling, plan.cpus_per_worker
    search = make_search(sweep)
    layouts = share_data(sweep, spec)
    if resume:
        check_trials(sweep, folder, layouts)
    prepare_folder()
    # With several workers a trial's own process only waits for them; they ask for what they need themselves.
    bundle = {"CPU": TRIAL_CPUS} if scaling.max_workers > 1 else worker_bundle(scaling, cpus)
    trainable = ray.tune.with_resources(
        ray.tune.with_parameters(train_trial, sweep=sweep, layouts=layouts, cpus=cpus),
        ray.tune.PlacementGroupFactory([bundle]),
    )
    place, is_known_later = str(folder.folder / ".tune"), sweep.settings.metric == ESTIMATE
    with quiet(verbose):
        if resume and ray.tune.Tuner.can_restore(place):
            tuner = ray.tune.Tuner.restore(place, trainable, resume_unfinished=True, resume_errored=True)
        else:
            tuner = ray.tune.Tuner(
                trainable,
                param_space=make_space(sweep),
                tune_config=ray.tune.TuneConfig(
                    metric=None if is_known_later else sweep.settings.metric,
                    mode=None if is_known_later else sweep.settings.direction,
                    num_samples=sweep.num_trials if sweep.is_searched else 1,
                    search_alg=search,
                    scheduler=make_scheduler(sweep),
                    max_concurrent_trials=plan.num_concurrent,
                    reuse_actors=True,
                ),
                run_config=ray.tune.RunConfig(
                    name=".tune",
                    storage_path=str(folder),
                    verbose=0,
                    failure_config=ray.tune.FailureConfig(max_failures=MAX_FAILURES),
                ),
            )
        if scaling.max_workers > 1:
            release_requests()  # each trial's own controller asks for its workers; else held until the sweep has ended
        results = tuner.fit()
    for result in results:
        name = (result.config or {}).get("trial") or (result.metrics or {}).get("trial_id")
        if result.error is not None and name is not None:
            note_failure(folder.trial(name), result.error)
    for name in folder.trial_names():
        note_end(folder.trial(name))
    evaluate_further(sweep, folder)


def check_trials(sweep: SweepConfig, folder: SweepFolder, layouts: Mapping[tuple[Any, ...], SharedData]) -> None:
    """Loads one checkpoint for each dataset that trials share, before the trials are resumed.

    Raises:
        RunError: it was trained on other data.
    """
    data = sweep.base.data
    seen: set[tuple[Any, ...]] = set()
    for name in folder.trial_names():
        run = folder.trial(name)
        checkpoint, _ = run.latest_checkpoint()
        if checkpoint is None:
            continue
        config = run.read_config()
        check_names(config.named_code, source=f"{run}/config.yaml")
        config = replace(config, data=replace(config.data, path=data.path, values=data.values, mix=data.mix))
        key = layout_key(config)
        if key in layouts and key not in seen:
            seen.add(key)
            check_checkpoint_on_ray(checkpoint, config, layouts[key])


def note_end(run: RunFolder) -> None:
    """Writes the summary of a trial that Tune ended before it could do so itself."""
    status, report = result_of(run)
    if status == "unfinished" and report is not None:
        algorithm = run.read_config().algorithm
        unknown = dict.fromkeys(("num_parameters", "train_wall_s", "updates_per_s"))
        run.write_summary(status="stopped", step=report.step, algorithm=algorithm, **unknown)


def evaluate_further(sweep: SweepConfig, folder: SweepFolder) -> None:
    """Plays the evaluations under further settings, one task each.

    A checkpoint that can't be played is named, and its rows are left out.
    """
    calls = {}
    for place, evaluation, file in further_evaluations(sweep, folder):
        calls[_evaluate.remote(place, evaluation, allowed_modules())] = place, evaluation, file
    waiting = list(calls)
    with saying_when_full("evaluations"):
        while waiting:
            (done,), waiting = ray.wait(waiting)
            place, evaluation, file = calls[done]
            result = _report(done, place, evaluation)
            if isinstance(result, UserError):
                log.warning("not evaluated: %s", result)
            else:
                file.write_text(result.to_json())


def _report(call: ray.ObjectRef, checkpoint: str, evaluation: EvaluationConfig) -> EvaluationReport | UserError:
    """The report of a task; if its process ended, the evaluation is played again on an actor."""
    try:
        return ray.get(call)
    except ray.exceptions.WorkerCrashedError:
        policy, facts = load_policy(Folder(checkpoint), evaluation)
        started = EvaluationActors.start(1, num_cpus=0)
        env_id = needed_environment(facts.env_id, "an evaluation of another kind")
        actors = EvaluationActors(started, env_id, evaluation, facts.env_kwargs)
        return actors.submit(policy, step=facts.step).result()


@ray.remote
def _evaluate(checkpoint: str, evaluation: EvaluationConfig, modules: tuple[str, ...]) -> EvaluationReport | UserError:
    torch.set_num_threads(1)
    allow_modules(*modules)
    try:
        return evaluate_checkpoint(checkpoint, evaluation)
    except UserError as error:
        return error


def share_data(sweep: SweepConfig, spec: SpaceSpec) -> dict[tuple[Any, ...], SharedData]:
    """Puts the data into the object store, once for all trials that share it.

    Raises:
        ConfigError: a setting of the data is drawn while the sweep runs, or `data.values` is no run.
    """
    if sweep.is_searched:
        axes = [axis for axis in sweep.training_axes if axis.key not in DATA_KEYS_READ_LATER]
        drawn = [axis.key for axis in axes if axis.is_continuous and axis.key.startswith("data.")]
        if drawn:
            raise ConfigError(f"{', '.join(drawn)}: the data is laid out before the search; give them by choice")
        configs = [sweep.base]
        for axis in axes:
            configs = [configure(config, {axis.key: value}) for config in configs for value in axis.values]
        if sweep.settings.num_seeds > 1:
            configs = [replace(config, seed=seed) for config in configs for seed in sweep.seeds]
    else:
        configs = [configure(sweep.base, chosen) for chosen in sweep.trials().values()]
    longest: dict[tuple[Any, ...], RunConfig] = {}
    for config in configs:
        key = layout_key(config)
        longest[key] = max(longest.get(key, config), config, key=window_length_of)
    resolved = [with_values_checkpoint(config) for config in longest.values()]
    return dict(zip(longest, prepare_layouts(resolved, spec), strict=True))


def make_space(sweep: SweepConfig) -> dict[str, Any]:
    """Tune's search space: the names of the trials, or the axes of a search."""
    if not sweep.is_searched:
        return {"trial": ray.tune.grid_search(list(sweep.trials()))}
    return {axis.key: _domain(axis) for axis in sweep.training_axes}


def _domain(axis: Axis) -> Any:
    if not axis.is_continuous:
        return ray.tune.choice(list(axis.values))
    low, high = axis.values
    kinds: dict[tuple[str, bool], Callable[..., Any]] = {
        ("uniform", False): ray.tune.uniform,
        ("uniform", True): ray.tune.randint,
        ("log_uniform", False): ray.tune.loguniform,
        ("log_uniform", True): ray.tune.lograndint,
    }
    return kinds[axis.kind, axis.is_integer](low, high + 1 if axis.is_integer else high)


def make_search(sweep: SweepConfig) -> Searcher | None:
    """Raises:
    ConfigError: the search needs a package that is not installed.
    """
    if sweep.settings.search == "random":
        return None
    if importlib.util.find_spec("optuna") is None:
        raise ConfigError('search=optuna needs the package optuna: pip install "dt-ray[optuna]"')
    import optuna
    from ray.tune.search import Repeater
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    search = OptunaSearch(metric=sweep.settings.metric, mode=sweep.settings.direction, seed=sweep.base.seed)
    return Repeater(search, repeat=sweep.settings.num_seeds) if sweep.settings.num_seeds > 1 else search


def make_scheduler(sweep: SweepConfig) -> TrialScheduler | None:
    """The scheduler that ends trials early; it compares trials at the same update, when they are evaluated."""
    every, total = sweep.base.evaluation.every, sweep.base.total_timesteps
    match sweep.settings.scheduler:
        case "asha":
            return ASHAScheduler(time_attr="step", max_t=total, grace_period=min(every, total), reduction_factor=3)
        case "median":
            return MedianStoppingRule(time_attr="step", grace_period=every, min_samples_required=2)
        case "pbt":
            mutations = {axis.key: _domain(axis) for axis in sweep.training_axes}
            return PopulationBasedTraining(
                time_attr="step", perturbation_interval=every, hyperparam_mutations=mutations, log_config=False
            )
        case _:
            return None

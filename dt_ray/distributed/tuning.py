"""Sweeps on Ray Tune: a trial trains in its own process, on data that all trials share."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import ray
import ray.tune
import torch
from pyarrow import fs
from ray.tune.schedulers import ASHAScheduler, MedianStoppingRule, PopulationBasedTraining, TrialScheduler
from ray.tune.search import Searcher

from dt_ray.config import EvaluationConfig, RunConfig
from dt_ray.context import LocalContext, Wish
from dt_ray.data.spaces import SpaceSpec
from dt_ray.distributed.cluster import quiet
from dt_ray.distributed.data import prepare_layouts
from dt_ray.distributed.resources import MAX_AUTOMATIC_CPUS_PER_WORKER, ResourcePlan
from dt_ray.distributed.training import train_on_ray
from dt_ray.errors import ConfigError, ResourceError, StorageError, UserError
from dt_ray.learners import Policy
from dt_ray.loop import run_training
from dt_ray.recording import TrainResult
from dt_ray.runs import RunFolder, with_values_checkpoint
from dt_ray.storage import Folder
from dt_ray.streaming import make_source
from dt_ray.sweep_config import Axis, SweepConfig, configure
from dt_ray.sweeps import SweepFolder, evaluate_checkpoint, further_evaluations, result_of

TUNE_SETTINGS = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # a run writes its own metrics
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "RAY_AIR_NEW_OUTPUT": "0",  # which prints whatever `verbose` says
}
MAX_FAILURES = 3  # lost processes that a trial survives
POLL_S = 0.5
ENDS_WITHIN_S = 60  # what a trial that is ended early may take for its last checkpoint; Tune gives 2
DATA_KEYS_READ_LATER = ("data.return_noise",)  # by the source of batches, not when the data is laid out


def tune_on_ray(
    sweep: SweepConfig,
    spec: SpaceSpec,
    prepare_folder: Callable[[], None],
    *,
    resume: bool = False,
    verbose: bool = False,
) -> None:
    """Trains and evaluates all trials of a sweep on the cluster that is joined; results are in their run folders.

    Raises:
        UserError: no trial can be run: the data is unsound, or there are too few CPUs.
    """
    folder = SweepFolder.of(sweep)
    cpus, num_concurrent = plan_trials(sweep, cpus=ray.cluster_resources().get("CPU", 0))
    search = make_search(sweep)
    layouts = share_data(sweep, spec)
    prepare_folder()
    workers = sweep.base.scaling.max_workers
    gpus = {"GPU": 1} if sweep.base.scaling.use_gpu else {}
    # With several workers a trial's own process only waits for them; they ask for CPUs themselves.
    bundle = {"CPU": cpus, **gpus} if workers <= 1 else {"CPU": 0.01}
    trainable = ray.tune.with_resources(
        ray.tune.with_parameters(train_trial, sweep=sweep, layouts=layouts, cpus=cpus),
        ray.tune.PlacementGroupFactory([bundle]),
    )
    place = str(folder.folder / ".tune")
    with quiet(verbose):
        if resume and ray.tune.Tuner.can_restore(place):
            tuner = ray.tune.Tuner.restore(place, trainable, resume_unfinished=True, resume_errored=True)
        else:
            tuner = ray.tune.Tuner(
                trainable,
                param_space=make_space(sweep),
                tune_config=ray.tune.TuneConfig(
                    metric=sweep.settings.metric,
                    mode=sweep.settings.direction,
                    num_samples=sweep.num_trials if sweep.is_searched else 1,
                    search_alg=search,
                    scheduler=make_scheduler(sweep),
                    max_concurrent_trials=num_concurrent,
                    reuse_actors=True,
                ),
                run_config=ray.tune.RunConfig(
                    name=".tune",
                    storage_path=str(folder),
                    verbose=0,
                    failure_config=ray.tune.FailureConfig(max_failures=MAX_FAILURES),
                ),
            )
        results = tuner.fit()
    for result in results:
        name = (result.config or {}).get("trial") or (result.metrics or {}).get("trial_id")
        if result.error is not None and name is not None:
            note_failure(folder.trial(name), result.error)
    for name in folder.trial_names():
        note_end(folder.trial(name))
    evaluate_further(sweep, folder)


def note_failure(run: RunFolder, error: BaseException) -> None:
    """Says in a trial's folder what ended it: a crash, or more lost processes than it may survive."""
    (run.folder / "error.txt").write_text(f"{str(error).strip()}\n")


def note_end(run: RunFolder) -> None:
    """Writes the summary of a trial that Tune ended before it could do so itself."""
    status, report = result_of(run)
    if status == "unfinished" and report is not None:
        algorithm = run.read_config().algorithm
        unknown = dict.fromkeys(("num_parameters", "train_wall_s", "updates_per_s"))
        run.write_summary(status="stopped", step=report["step"], algorithm=algorithm, **unknown)


def evaluate_further(sweep: SweepConfig, folder: SweepFolder) -> None:
    """Plays the evaluations under other settings than those of the training, a task each."""
    calls = {
        _evaluate.remote(place, evaluation): file for place, evaluation, file in further_evaluations(sweep, folder)
    }
    waiting = list(calls)
    while waiting:
        (done,), waiting = ray.wait(waiting)
        calls[done].write_text(ray.get(done))


@ray.remote
def _evaluate(checkpoint: str, evaluation: EvaluationConfig) -> str:
    torch.set_num_threads(1)
    return json.dumps(evaluate_checkpoint(checkpoint, evaluation), indent=1) + "\n"


def plan_trials(sweep: SweepConfig, *, cpus: float) -> tuple[float, int]:
    """CPUs of a worker, and how many trials there is room for at a time.

    Raises:
        ResourceError: not even one.
    """
    scaling, settings = sweep.base.scaling, sweep.settings
    workers = max(1, scaling.max_workers)
    wanted = min(sweep.num_trials, settings.max_concurrent or sweep.num_trials)
    a_worker = scaling.cpus_per_worker
    if a_worker is None:
        fair = math.floor(cpus / (wanted * workers))
        a_worker = float(min(max(1, fair), MAX_AUTOMATIC_CPUS_PER_WORKER))
    # The process of a trial with several workers takes a hundredth of a CPU itself.
    a_trial = a_worker if workers == 1 else workers * a_worker + 0.01
    room = math.floor(cpus / a_trial + 1e-6)
    if room == 0:
        raise ResourceError(
            f"a trial of {workers} worker(s) with {a_worker:g} CPU(s) each asks for {a_trial:g} CPUs and there are "
            f"{cpus:g}; lower scaling.num_workers or scaling.cpus_per_worker"
        )
    return a_worker, min(wanted, room)


def layout_key(config: RunConfig) -> tuple[Any, ...]:
    """What the data of a run is laid out by; the longest window of all runs serves each of them."""
    data = replace(config.data, return_noise=0.0, window_length=None)
    return repr(data), config.return_source, config.seed, config.model.max_timesteps, config.model.clamp_timesteps


def share_data(sweep: SweepConfig, spec: SpaceSpec) -> dict[tuple[Any, ...], ray.ObjectRef]:
    """The data in the object store, once for all trials that train on it alike.

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
        longest[key] = max(longest.get(key, config), config, key=lambda each: each.window_length)
    resolved = [with_values_checkpoint(config) for config in longest.values()]
    return dict(zip(longest, prepare_layouts(resolved, spec), strict=True))


def make_space(sweep: SweepConfig) -> dict[str, Any]:
    """The trials by name, or what is to be searched."""
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
    """Looks at trials by their updates, whenever they are evaluated."""
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


class TrialContext(LocalContext):
    """A trial that trains in its own process. Evaluations are reported, and Tune may end the trial then."""

    def __init__(self, config: RunConfig, sweep: SweepConfig, *, device: str) -> None:
        super().__init__(config, device=device)
        self.sweep = sweep
        self._evaluated = 0
        self.hands_on = sweep.settings.scheduler == "pbt"  # its checkpoints to other trials
        self.is_ended = False
        self._reported = 0

    def wish(self) -> Wish:
        try:
            self.report_new(RunFolder.of(self.config))
        except SystemExit:  # how Tune ends a trial, in its call to `report`
            self.is_ended = True
            return Wish.STOP
        return super().wish()

    def evaluate(self, policy: Policy, *, step: int) -> Future[dict[str, Any]]:
        self._evaluated = step
        return super().evaluate(policy, step=step)

    def report_new(self, run: RunFolder) -> None:
        """Tells Tune of the newest evaluation, once that and its checkpoint are written."""
        step = self._evaluated
        if step > self._reported and step < self.config.total_timesteps and run.has_evaluation(step):
            self._reported = step
            metrics = metrics_of(run.read_evaluation(step), self.sweep)
            if not self.hands_on:
                ray.tune.report(metrics)
                return
            with tempfile.TemporaryDirectory() as copy:  # the run's own may be pruned while Tune reads them
                copy_newest_checkpoint(run, copy)
                ray.tune.report(metrics, checkpoint=ray.tune.Checkpoint.from_directory(copy))

    def latest_checkpoint(self) -> Folder | None:
        given = ray.tune.get_checkpoint() if self.hands_on else None  # that of a better trial
        return Folder(given.path) if given is not None else super().latest_checkpoint()


def copy_newest_checkpoint(run: RunFolder, target: str) -> None:
    """Copies the newest complete checkpoint, or a newer one that takes its place meanwhile."""
    while True:
        newest, _ = run.latest_checkpoint()
        assert newest is not None, run
        try:
            fs.copy_files(newest.uri, target)
            return
        except FileNotFoundError:
            continue


def metrics_of(report: Mapping[str, Any], sweep: SweepConfig) -> dict[str, float]:
    """What Tune compares trials by: the best of the returns, or the mean distance from those asked for."""
    targets = report["targets"]
    means = [target["return_mean"] for target in targets]
    scores = [target["normalized_score"] for target in targets if target["normalized_score"] is not None]
    errors = [abs(target["return_mean"] - target["target_return"]) for target in targets]
    values = {"return_mean": max(means), "obedience_error": sum(errors) / len(errors)}
    return {"step": report["step"], **values, **({"normalized_score": max(scores)} if scores else {})}


def train_trial(
    drawn: dict[str, Any], *, sweep: SweepConfig, layouts: Mapping[tuple[Any, ...], ray.ObjectRef], cpus: float
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
        run.write_config(config)
        data = layouts[layout_key(config)]
        train = _train_with_workers if config.scaling.max_workers > 1 else _train_here
        report = train(config, sweep, data, cpus).summary["last"]
        ray.tune.report(metrics_of(report, sweep))
    except StorageError:  # Tune tries again
        raise
    except UserError as error:  # which another attempt would end with as well
        note_failure(run, error)
        worst = -math.inf if sweep.settings.direction == "max" else math.inf
        ray.tune.report({"step": sweep.base.total_timesteps, sweep.settings.metric: worst})


def _train_here(config: RunConfig, sweep: SweepConfig, data: ray.ObjectRef, cpus: float) -> TrainResult:
    torch.set_num_threads(max(1, min(int(cpus), os.cpu_count() or 1)))
    context = TrialContext(config, sweep, device="cuda" if config.scaling.use_gpu else "cpu")
    source = make_source(ray.get(data), config, device=context.device)
    result = run_training(config, source, context)
    if context.is_ended:
        sys.exit(0)  # as Tune's `report` would have
    return result


def _train_with_workers(config: RunConfig, sweep: SweepConfig, data: ray.ObjectRef, cpus: float) -> TrainResult:
    """A trainer of its own, whose evaluations are looked for and reported here."""
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

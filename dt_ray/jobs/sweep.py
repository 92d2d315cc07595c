"""Runs a sweep and writes its tables."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import replace
from typing import Any

import torch

from dt_ray.config.modules import KEYS, allow_modules
from dt_ray.config.schema import EvaluationConfig
from dt_ray.errors import RunError
from dt_ray.jobs.execution import prepared_cluster
from dt_ray.jobs.offline import estimate_in, load_world, world_checkpoint
from dt_ray.jobs.training import check_inputs_are_there, check_run, name_run
from dt_ray.learners import check_settings
from dt_ray.runs.checkpoint import read_facts
from dt_ray.runs.lease import Lease
from dt_ray.runs.writing import to_json
from dt_ray.sweeps.config import ESTIMATE, SweepConfig, configure
from dt_ray.sweeps.folder import SweepFolder, result_of
from dt_ray.sweeps.tables import evaluate_best, find_best, read_rows, write_table
from dt_ray.training.interrupts import raise_on_sigterm

log = logging.getLogger("dt_ray")

Watch = Callable[[SweepConfig], AbstractContextManager[Any]]  # shows a sweep while it takes place


def run_sweep(
    sweep: SweepConfig,
    *,
    resume: bool = False,
    overwrite: bool = False,
    verbose: bool = False,
    dashboard: bool = False,
    watch: Watch = nullcontext,
) -> dict[str, Any] | None:
    """Runs the trials of a sweep that have not run yet and writes its tables; returns the content of `best.json`.

    Raises:
        UserError: anything that the user can mend, named before a trial starts where it can be known.
    """
    from dt_ray.distributed.cluster import environment, plan_trials_on_cluster
    from dt_ray.distributed.resources import TrialPlan
    from dt_ray.distributed.tuning import TUNE_SETTINGS, tune_on_ray

    sweep = replace(sweep, base=name_run(sweep.base, "sweep"))
    folder = SweepFolder.of(sweep)
    axes = {axis.key for axis in sweep.axes}
    spec = check_run(sweep.base, is_new=not resume and "algorithm" not in axes)
    for names in named_code(sweep):
        allow_modules(*names.values())
    for chosen in [] if sweep.is_searched else sweep.trials().values():
        check_settings(configure(sweep.base, chosen), every_section=False)
    lease = Lease(folder.folder)
    lease.check_free()
    if not resume and not overwrite:
        folder.check_free()
    if resume:
        check_inputs_are_there(sweep.base, str(folder))

    def prepare_folder() -> None:
        lease.acquire()
        if resume:
            folder.write(sweep)
        else:
            folder.create(sweep, overwrite=overwrite)

    def make_plan() -> TrialPlan:
        if threading.current_thread() is threading.main_thread():
            raise_on_sigterm()  # Ray has its own way
        wanted = min(sweep.num_trials, sweep.settings.max_concurrent or sweep.num_trials)
        return plan_trials_on_cluster(sweep.base.scaling, wanted=wanted)

    cluster = prepared_cluster(sweep.base, spec, make_plan, verbose=verbose, dashboard=dashboard)
    try:
        with closing(lease), environment(TUNE_SETTINGS), cluster as plan, watch(sweep):
            tune_on_ray(sweep, spec, plan, prepare_folder, resume=resume, verbose=verbose)
    except KeyboardInterrupt:
        if folder.is_sweep():
            log.warning("stopped; resume with: python -m dt_ray.sweep --resume %s", folder)
        raise
    if sweep.settings.metric == ESTIMATE:
        estimate_trials(sweep, folder, verbose=verbose)
    return write_results(sweep, folder)


def estimate_trials(sweep: SweepConfig, folder: SweepFolder, *, verbose: bool) -> None:
    """Estimates all trials' returns in one world model of the log, which lies beside the sweep."""
    torch.set_num_threads(1)
    here = replace(sweep.base, scaling=replace(sweep.base.scaling, num_workers=0))
    found = world_checkpoint(here, folder.folder, None, verbose=verbose)
    world = load_world(found, read_facts(found).spec)  # the log of all trials
    for name in folder.trial_names():
        run = folder.trial(name)
        status, report = result_of(run)
        if report is None or run.read_offline(report.step) is not None:
            continue
        log.info("estimating trial %s (%s)", name, status)
        estimate_in(world, run.checkpoint(report.step), run.read_config().evaluation)


def named_code(sweep: SweepConfig) -> list[Mapping[str, str | None]]:
    """The settings of a sweep's trials that may name code, as `module:name`, by their keys."""
    swept = [{axis.key: str(value)} for axis in sweep.axes if axis.key in KEYS for value in axis.values]
    return [sweep.base.named_code, *swept]


def write_results(sweep: SweepConfig, folder: SweepFolder) -> dict[str, Any] | None:
    """Writes `trials.csv` and `best.json` from the results of the trials."""
    rows = read_rows(sweep, folder)
    write_table(rows, folder.folder / "trials.csv")
    torch.set_num_threads(1)  # as the command, whose every digit depends on it
    while (best := find_best(rows, sweep)) is not None:
        try:
            if sweep.base.env_id is None:
                offline = " --offline" if sweep.settings.metric == ESTIMATE else ""
                best["command"] = f"python -m dt_ray.evaluate {best['checkpoint']}{offline}"
            else:
                best = evaluate_best(best, best_evaluation(best, sweep, folder))
        except RunError as error:  # noqa: PERF203
            log.warning("the best trial's checkpoint can't be played, so the next best trial is taken: %s", error)
            rows = [row for row in rows if row["trial"] != best["trial"]]
        else:
            (folder.folder / "best.json").write_text(to_json(best, indent=1))
            return best
    return None


def best_evaluation(best: dict[str, Any], sweep: SweepConfig, folder: SweepFolder) -> EvaluationConfig:
    """The settings of the best setting's evaluation."""
    run = folder.trial(best["trial"])
    asked = best["settings"]
    (evaluation,) = (
        replace(evaluation, target_returns=(asked["target_return"],))
        for evaluation in sweep.evaluations(run.read_config())
        if all(getattr(evaluation, key.removeprefix("evaluation.")) == value
               for key, value in asked.items() if key.startswith("evaluation."))
    )  # fmt: skip
    return evaluation


def raise_failures(folder: SweepFolder) -> None:
    """Raises:
    RunError: no trial was evaluated; the message has the error of each trial.
    """
    failures: dict[str, list[str]] = {}
    for name in folder.trial_names():
        error = folder.trial(name).folder / "error.txt"
        text = error.read_text().strip() if error.exists() else "it was not evaluated"
        failures.setdefault(text.splitlines()[-1] if text else "", []).append(name)
    said = "; ".join(f"{', '.join(names)}: {text}" for text, names in failures.items())
    raise RunError(f"no trial of {folder} was evaluated. {said}")

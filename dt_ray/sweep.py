"""Sweeps settings with Ray Tune: trains every combination once and asks each model for every target return.

    python -m dt_ray.sweep                                     context lengths 1, 5, 20 and eight target returns
    python -m dt_ray.sweep name=mine num_seeds=3 'model.context_length={grid: [5, 10]}'
    python -m dt_ray.sweep 'optim.learning_rate={log_uniform: [1e-4, 1e-2]}' num_samples=20 \\
        scheduler=asha evaluation.every=500
    python -m dt_ray.sweep --sweep FILE --config FILE
    python -m dt_ray.sweep --resume sweeps/mine                what is finished is not run again
    python -m dt_ray.sweep --resume sweeps/mine data.path=DIR  its data was moved; so may the sweep's folder be

A value {grid: [...]}, {choice: [...]}, {uniform: [low, high]} or {log_uniform: [low, high]} sweeps its key. Further
keys: num_samples, num_seeds, metric, scheduler (none, asha, median, pbt), search (random, optuna), max_concurrent.
"""

from __future__ import annotations

import argparse
import logging
import threading
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dt_ray.command import add_modules_argument, run_command, show_log
from dt_ray.interrupts import raise_on_sigterm
from dt_ray.modules import KEYS

if TYPE_CHECKING:
    from dt_ray.config import EvaluationConfig
    from dt_ray.sweep_config import SweepConfig
    from dt_ray.sweeps import SweepFolder

log = logging.getLogger("dt_ray")

DEFAULT_SWEEP = "target_return_context_length"


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m dt_ray.sweep", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", metavar="NAME|FILE", help="configuration to start from")
    parser.add_argument("--sweep", metavar="NAME|FILE", help=f"what to sweep (default {DEFAULT_SWEEP})")
    parser.add_argument("--resume", metavar="SWEEP", help="go on with this sweep")
    parser.add_argument("--overwrite", action="store_true", help="replace a sweep of the same name")
    parser.add_argument("--print-config", action="store_true", help="print the resolved sweep and stop")
    parser.add_argument("--dashboard", action="store_true", help="start Ray's dashboard with a cluster started here")
    parser.add_argument("--verbose", action="store_true", help="show Ray's own messages too")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings to change or to sweep")
    add_modules_argument(parser)
    options = parser.parse_intermixed_args(arguments)
    if options.resume and (options.config or options.sweep or options.overwrite):
        parser.error("--resume takes its settings from the sweep: leave out --config, --sweep and --overwrite")

    from dt_ray.modules import check_names
    from dt_ray.runs import default_name
    from dt_ray.storage import Folder
    from dt_ray.sweep_config import load_sweep
    from dt_ray.sweeps import SweepFolder

    if options.resume:
        sweep = SweepFolder(Folder.at(options.resume)).read(options.overrides)
        for names in named_code(sweep):
            check_names(names, source=f"{options.resume}/sweep.yaml")
    else:
        name = options.sweep or DEFAULT_SWEEP
        sweep = load_sweep(name, options.config, options.overrides, default_name=default_name(name))
    if options.print_config:
        print(sweep.to_yaml(), end="")
        return
    show_log()
    best = run_sweep(
        sweep,
        resume=bool(options.resume),
        overwrite=options.overwrite,
        verbose=options.verbose,
        dashboard=options.dashboard,
    )
    folder = SweepFolder.of(sweep)
    if best is None:
        raise_failures(folder)
        return
    from dt_ray.reporting import write_report

    write_report([str(folder)], folder.folder / "report")
    show_results(folder, best)


def run_sweep(
    sweep: SweepConfig,
    *,
    resume: bool = False,
    overwrite: bool = False,
    verbose: bool = False,
    dashboard: bool = False,
) -> dict[str, Any] | None:
    """Runs what a sweep has not run yet and writes its tables; returns what `best.json` says.

    Raises:
        UserError: anything that the user can mend, named before a trial starts where it can be known.
    """
    from dt_ray.distributed.cluster import connection, environment, plan_trials_on_cluster
    from dt_ray.distributed.collect import collect_on_ray
    from dt_ray.distributed.evaluation import try_environment_on_ray
    from dt_ray.distributed.paths import check_data, check_storage
    from dt_ray.distributed.tuning import TUNE_SETTINGS, tune_on_ray
    from dt_ray.launch import check_inputs_are_there, check_run, make_dataset, name_run, needs_dataset
    from dt_ray.lease import Lease
    from dt_ray.modules import allow_modules
    from dt_ray.progress import sweep_progress
    from dt_ray.sweeps import SweepFolder

    sweep = replace(sweep, base=name_run(sweep.base, "sweep"))
    folder = SweepFolder.of(sweep)
    spec = check_run(sweep.base)
    for names in named_code(sweep):
        allow_modules(*names.values())
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

    try:
        with closing(lease), environment(TUNE_SETTINGS), connection(verbose=verbose, dashboard=dashboard):
            if threading.current_thread() is threading.main_thread():
                raise_on_sigterm()  # Ray has its own way
            wanted = min(sweep.num_trials, sweep.settings.max_concurrent or sweep.num_trials)
            plan = plan_trials_on_cluster(sweep.base.scaling, wanted=wanted)
            check_storage(sweep.base)
            try_environment_on_ray(sweep.base)
            if needs_dataset(sweep.base):
                make_dataset(sweep.base, collect_on_ray, spec=spec)
            check_data(sweep.base)
            with sweep_progress(sweep):
                tune_on_ray(sweep, spec, plan, prepare_folder, resume=resume, verbose=verbose)
    except KeyboardInterrupt:
        if folder.is_sweep():
            log.warning("stopped; go on with: python -m dt_ray.sweep --resume %s", folder)
        raise
    return write_results(sweep, folder)


def named_code(sweep: SweepConfig) -> list[Mapping[str, str | None]]:
    """The settings of a sweep's trials that may name code, as `module:name`, by their keys."""
    swept = [{axis.key: str(value)} for axis in sweep.axes if axis.key in KEYS for value in axis.values]
    return [sweep.base.named_code, *swept]


def write_results(sweep: SweepConfig, folder: SweepFolder) -> dict[str, Any] | None:
    """Writes `trials.csv` and `best.json`, of what the trials gave."""
    import torch

    from dt_ray.errors import RunError
    from dt_ray.sweeps import evaluate_best, find_best, read_rows, write_table
    from dt_ray.writing import to_json

    rows = read_rows(sweep, folder)
    write_table(rows, folder.folder / "trials.csv")
    torch.set_num_threads(1)  # as the command, whose every digit depends on it
    while (best := find_best(rows, sweep)) is not None:
        try:
            best = evaluate_best(best, best_evaluation(best, sweep, folder))
        except RunError as error:  # noqa: PERF203
            log.warning("the best of the rest: the best trial's checkpoint can't be played: %s", error)
            rows = [row for row in rows if row["trial"] != best["trial"]]
        else:
            (folder.folder / "best.json").write_text(to_json(best, indent=1))
            return best
    return None


def best_evaluation(best: dict[str, Any], sweep: SweepConfig, folder: SweepFolder) -> EvaluationConfig:
    """The settings of the evaluation that `find_best` found."""
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
    RunError: no trial came to an evaluation; says what each kind of them ended with.
    """
    from dt_ray.errors import RunError

    failures: dict[str, list[str]] = {}
    for name in folder.trial_names():
        error = folder.trial(name).folder / "error.txt"
        text = error.read_text().strip() if error.exists() else "it was not evaluated"
        failures.setdefault(text.splitlines()[-1] if text else "", []).append(name)
    said = "; ".join(f"{', '.join(names)}: {text}" for text, names in failures.items())
    raise RunError(f"no trial of {folder} came to an evaluation. {said}")


def show_results(folder: SweepFolder, best: dict[str, Any]) -> None:
    settings = "  ".join(f"{key}={value}" for key, value in best["settings"].items())
    print(f"best    {settings}")
    interval = " .. ".join(f"{bound:.1f}" for bound in best["metric_ci95"] or ())
    seeds = f"the mean of {best['num_seeds']} seeds, 95% interval {interval}" if interval else "one seed"
    print(f"        {best['metric']} {best['metric_mean']:.1f}, {seeds}")
    print(f"sweep   {folder}")
    print(f"table   {folder}/trials.csv")
    print(f"report  {folder}/report/report.html")
    print(f"next    {best['command']}")


if __name__ == "__main__":
    run_command(main)

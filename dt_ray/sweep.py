"""Sweeps settings with Ray Tune: trains every combination once and asks each model for every target return.

    python -m dt_ray.sweep                                     context lengths 1, 5, 20 and eight target returns
    python -m dt_ray.sweep data.path=LOG                       context lengths on a log of yours
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
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dt_ray.cli.command import add_modules_argument, print_derived, run_command, show_log

if TYPE_CHECKING:
    from dt_ray.config.schema import RunConfig
    from dt_ray.sweeps.folder import SweepFolder


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m dt_ray.sweep", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", metavar="NAME|FILE", help="configuration to start from")
    parser.add_argument("--sweep", metavar="NAME|FILE", help="what to sweep (context lengths, and Pendulum's returns)")
    parser.add_argument("--resume", metavar="SWEEP", help="resume this sweep")
    parser.add_argument("--overwrite", action="store_true", help="replace a sweep of the same name")
    parser.add_argument("--print-config", action="store_true", help="print the resolved sweep and stop")
    parser.add_argument("--dashboard", action="store_true", help="start Ray's dashboard with a cluster started here")
    parser.add_argument("--verbose", action="store_true", help="show Ray's own messages too")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings to change or to sweep")
    add_modules_argument(parser)
    return parser


def main(arguments: Sequence[str]) -> None:
    parser = make_parser()
    options = parser.parse_intermixed_args(arguments)
    if options.resume and (options.config or options.sweep or options.overwrite):
        parser.error("--resume takes its settings from the sweep: leave out --config, --sweep and --overwrite")

    from dt_ray.config.modules import check_names
    from dt_ray.runs.storage import Folder
    from dt_ray.sweeps.folder import SweepFolder
    from dt_ray.sweeps.loading import load_sweep

    if options.resume:
        from dt_ray.jobs.sweep import named_code

        sweep = SweepFolder(Folder.at(options.resume)).read(options.overrides)
        for names in named_code(sweep):
            check_names(names, source=f"{options.resume}/sweep.yaml")
    else:
        from dt_ray.jobs.deriving import resolve_settings

        def resolve(tree: Mapping[str, Any]) -> RunConfig:
            settings = resolve_settings(tree, verbose=options.verbose)
            print_derived(settings.derived)
            return settings.config

        sweep = load_sweep(options.sweep, options.config, options.overrides, resolve=resolve)
    if options.print_config:
        print(sweep.to_yaml(), end="")
        return
    from dt_ray.cli.progress import sweep_progress
    from dt_ray.jobs.sweep import raise_failures, run_sweep
    from dt_ray.reports.page import write_report

    show_log()
    best = run_sweep(
        sweep,
        resume=bool(options.resume),
        overwrite=options.overwrite,
        verbose=options.verbose,
        dashboard=options.dashboard,
        watch=sweep_progress,
    )
    folder = SweepFolder.of(sweep)
    if best is None:
        raise_failures(folder)
        return
    write_report([str(folder)], folder.folder / "report")
    show_results(folder, best)


def show_results(folder: SweepFolder, best: dict[str, Any]) -> None:
    settings = "  ".join(f"{key}={value}" for key, value in best["settings"].items())
    print(f"best    {settings}")
    digits = 4 if best["metric"] in ("action_error", "normalized_score") else 1
    interval = " .. ".join(f"{bound:.{digits}f}" for bound in best["metric_ci95"] or ())
    seeds = f"the mean of {best['num_seeds']} seeds, 95% interval {interval}" if interval else "one seed"
    print(f"        {best['metric']} {best['metric_mean']:.{digits}f}, {seeds}")
    print(f"sweep   {folder}")
    print(f"table   {folder}/trials.csv")
    print(f"report  {folder}/report/report.html")
    print(f"next    {best['command']}")


if __name__ == "__main__":
    run_command(main)

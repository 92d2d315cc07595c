"""Trains a return-conditioned policy from logged data.

    python -m dt_ray.train                                                  the main job: Pendulum, all by itself
    python -m dt_ray.train data.path=LOG                                    a log of yours; what can be derived is
    python -m dt_ray.train data.path=LOG env_id=Hopper-v5                   the same, evaluated in an environment
    python -m dt_ray.train --config decision_transformer/pendulum_random    another configuration, by name or file
    python -m dt_ray.train name=mine total_timesteps=500 optim.batch_size=128
    python -m dt_ray.train --resume runs/mine total_timesteps=1000
    python -m dt_ray.train --print-config                                   every key and its value
    python -m dt_ray.train --plan scaling.num_workers=8                     what that asks of the cluster
    python -m dt_ray.train --list                                           the packaged experiments

Exit codes: 0 done; 2 yours to fix, one message says what.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dt_ray.cli.command import (
    add_modules_argument,
    print_derived,
    print_evaluation,
    print_offline,
    run_command,
    show_log,
)
from dt_ray.config.schema import DEFAULT_CONFIG, NEUTRAL_CONFIG, RunConfig
from dt_ray.config.targets import show_target

if TYPE_CHECKING:
    from dt_ray.runs.offline_report import OfflineReport
    from dt_ray.training.recorder import TrainResult

CONFIG_HELP = f"configuration to start from ({DEFAULT_CONFIG}; {NEUTRAL_CONFIG} where a log or environment is named)"


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m dt_ray.train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", metavar="NAME|FILE", help=CONFIG_HELP)
    parser.add_argument("--resume", metavar="RUN", help="resume this run from its newest complete checkpoint")
    parser.add_argument("--overwrite", action="store_true", help="replace a run of the same name")
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and stop")
    parser.add_argument("--plan", action="store_true", help="print what the run asks of the cluster, and stop")
    parser.add_argument("--list", action="store_true", help="print the packaged experiments and stop")
    parser.add_argument("--dashboard", action="store_true", help="start Ray's dashboard with a cluster started here")
    parser.add_argument("--verbose", action="store_true", help="show Ray's own messages too")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings to change")
    add_modules_argument(parser)
    return parser


def main(arguments: Sequence[str]) -> None:
    parser = make_parser()
    options = parser.parse_intermixed_args(arguments)
    if options.resume and (options.config or options.overwrite):
        parser.error("--resume takes its configuration from the run: leave out --config and --overwrite")

    if options.list:
        list_experiments()
        return

    from dt_ray.config.loading import read_settings, to_yaml

    name = options.config or DEFAULT_CONFIG
    if options.resume is None:
        from dt_ray.jobs.deriving import name_of_log, resolve_settings

        settings = resolve_settings(read_settings(options.config, options.overrides), verbose=options.verbose)
        config, read = settings.config, settings.read
        print_derived(settings.derived)
        if options.config is None and settings.derived:
            name = name_of_log(config)
    else:
        from dt_ray.jobs.training import resumed_config

        config, read = resumed_config(options.resume, options.overrides), None
    if options.print_config:
        print(to_yaml(config), end="")
        return

    if options.plan:
        show_plan(config, verbose=options.verbose)
        return

    from dt_ray.cli.progress import progress
    from dt_ray.jobs.offline import train_and_estimate
    from dt_ray.jobs.training import name_run, tell_how_to_resume

    show_log()
    if options.resume is None:
        config = name_run(config, name)
    try:
        new = {"overwrite": options.overwrite, "read": read} if options.resume is None else {}
        result, estimate = train_and_estimate(
            config,
            resume=options.resume is not None,
            watch=progress,
            verbose=options.verbose,
            dashboard=options.dashboard,
            **new,
        )
    except KeyboardInterrupt:
        tell_how_to_resume(config)
        raise
    show_result(result, config, estimate)


def show_result(result: TrainResult, config: RunConfig, estimate: OfflineReport | None) -> None:
    """Prints the last evaluation and the estimate from the log, where the run is, and the commands to type next."""
    from dt_ray.config.experiments import find_experiment
    from dt_ray.runs.evaluation_report import EvaluationReport
    from dt_ray.runs.folder import RECOMMENDED, RunFolder

    if result.summary["last"]:
        report = EvaluationReport.from_dict(result.summary["last"])
        print_evaluation(report)
        if (experiment := find_experiment(config)) is not None:
            print(f"experiment  {experiment.config}: {experiment.judge(report.return_means)}")
    if estimate is not None:
        print_offline(estimate)
    print(f"run         {result.run}")
    print(f"checkpoint  {RunFolder.of(config).checkpoint(result.summary['step'])}")
    recommended = None if estimate is None or estimate.best_target is None else estimate.step
    if recommended is not None:
        print(f"recommended {result.run}/checkpoints/{RECOMMENDED}, the one after {recommended} updates")
    commands = [f"python -m dt_ray.train --resume {result.run} total_timesteps={2 * config.total_timesteps}"]
    if result.summary["last"] and config.env_id is not None:
        asked = show_target(statistics.median_low(config.evaluation.target_returns))
        options = f"--target-return {asked} --plot obedience.png"
        commands.insert(0, f"python -m dt_ray.evaluate {result.run} {options}")
    elif recommended is not None:
        commands.insert(0, f"python -m dt_ray.export {result.run}/checkpoints/{RECOMMENDED}")
    if result.summary["last"]:
        commands.insert(0, f"python -m dt_ray.report {result.run}")
    for title, command in zip(["next", *[""] * len(commands)], commands, strict=False):
        print(f"{title:<12}{command}")


def show_plan(config: RunConfig, *, verbose: bool) -> None:
    """Raises:
    ResourceError: the cluster has not enough for the run.
    """
    from dt_ray.distributed.cluster import connection, describe_on_cluster

    with connection(verbose=verbose):
        for name, value in describe_on_cluster(config).items():
            print(f"{name:<18} {value}")


def list_experiments() -> None:
    from dt_ray.config.experiments import EXPERIMENTS
    from dt_ray.config.loading import packaged_names
    from dt_ray.config.targets import show_target

    for each in EXPERIMENTS:
        low, high = each.expected
        print(f"{each.config}\n    {each.purpose}")
        print(f"    expected {low:g} .. {high:g}, asked for {show_target(each.target_return)}")
        if each.baselines:
            print(f"    beside it {', '.join(each.baselines)}")
    known = {each.config for each in EXPERIMENTS}
    others = [name for name in packaged_names() if name not in known and not name.startswith("sweep/")]
    print(f"other configurations, without expected returns\n    {', '.join(others)}")


if __name__ == "__main__":
    run_command(main)

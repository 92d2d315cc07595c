"""What the commands share: exit codes, messages and tables."""

from __future__ import annotations

import argparse
import logging
import math
import signal
import sys
from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from dt_ray.config.modules import allow_modules
from dt_ray.config.targets import AUTO, read_target, show_target
from dt_ray.errors import UserError
from dt_ray.training.interrupts import Terminated, raise_on_sigterm, sigterm_received

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from dt_ray.config.derived import Derived
    from dt_ray.runs.evaluation_report import EvaluationReport, HeldOutResult
    from dt_ray.runs.offline_report import OfflineReport

USER_ERROR = 2
LOG_WIDTH = 140  # characters of a table that goes to a file


def run_command(main: Callable[[Sequence[str]], None]) -> None:
    """Runs `main` on the command line: exit code 0, 2 with one message for a `UserError`, 130 Ctrl-C, 143 SIGTERM."""
    raise_on_sigterm()
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(USER_ERROR)
    except KeyboardInterrupt as stop:
        print("stopped", file=sys.stderr)
        is_sigterm = isinstance(stop, Terminated) or sigterm_received.is_set()
        sys.exit(128 + (signal.SIGTERM if is_sigterm else signal.SIGINT))
    except BrokenPipeError:
        sys.exit(141)


def add_modules_argument(parser: argparse.ArgumentParser) -> None:
    """Adds `--import`; modules that are given are allowed while the command line is read."""

    class Allow(argparse.Action):
        def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
            allow_modules(values)

    text = "a module of yours that the checkpoint or run names: its learner or environment"
    parser.add_argument("--import", metavar="MODULE", action=Allow, dest="modules", help=text)


def target_return(text: str) -> float | str:
    """The type of an option that takes a target return; `auto` stays as it is.

    Raises:
        ArgumentTypeError: it is neither a number nor `max` nor `auto`.
    """
    try:
        return text if text == AUTO else read_target(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"a target return is a number, max or auto, got {text!r}") from None


def show_log() -> None:
    """Sends dt_ray's own log lines to the terminal."""
    log = logging.getLogger("dt_ray")
    log.setLevel(logging.INFO)
    log.handlers = [TerminalHandler()]


def print_derived(derived: Sequence[Derived]) -> None:
    """Prints the derived settings with the reasons for their values to stderr."""
    if not derived:
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title="derived from the log and the environment; any of it can be set")
    table.add_column("setting", no_wrap=True)
    table.add_column("value", max_width=40)
    table.add_column("why")
    for each in derived:
        table.add_row(each.key, each.shown, each.why)
    Console(stderr=True, soft_wrap=False, width=None if sys.stderr.isatty() else LOG_WIDTH).print(table)


def print_evaluation(report: EvaluationReport) -> None:
    """Prints the results for each target return, or the errors of actions on held-out episodes, to stdout."""
    from rich.console import Console
    from rich.table import Table

    if report.held_out is not None:
        Console(soft_wrap=True).print(_held_out_table(report, report.held_out))
        return
    table = Table(
        title=f"{report.env_id}, {report.num_episodes} episodes a target from seed {report.seed}, "
        f"after {report.step} updates"
    )
    for column in ("target return", "mean return", "95% interval", "std", "off by (90%)", "score"):
        table.add_column(column, justify="right")
    for target in report.targets:
        low, high = target.return_ci95
        score, (median, most) = target.normalized_score, target.distances
        asked = target.asked_target_return
        table.add_row(
            show_target(target.target_return) + ("" if asked is None else f" (asked: {show_target(asked)})"),
            f"{target.return_mean:.1f}",
            f"{low:.1f} .. {high:.1f}",
            f"{target.return_std:.1f}",
            "–" if math.isnan(median) else f"{median:.1f} ({most:.1f})",
            "–" if score is None else f"{score:.3f}",
        )
    Console(soft_wrap=True, width=None if sys.stdout.isatty() else LOG_WIDTH).print(table)


def print_offline(report: OfflineReport) -> None:
    """Prints the estimates from the log alone, and which target returns it supports, to stdout."""
    from rich.console import Console
    from rich.table import Table

    low, high = report.logged_returns
    table = Table(
        title=f"estimated from {', '.join(report.log)} alone, after {report.step} updates; its returns are "
        f"{low:.4g} .. {high:.4g}"
    )
    for column in ("target return", "estimated return", "90% interval", "starts that back it"):
        table.add_column(column, justify="right")
    table.add_column("verdict")
    for target in sorted(report.targets, key=lambda each: each.target_return, reverse=True):
        value, interval, share = target.estimated_return, target.interval90, target.supported_share
        table.add_row(
            show_target(target.target_return),
            "–" if value is None else f"{value:.1f}",
            "–" if interval is None else f"{interval[0]:.1f} .. {interval[1]:.1f}",
            "–" if share is None else f"{share:.0%}",
            target.verdict,
        )
    console = Console(soft_wrap=False, width=None if sys.stdout.isatty() else LOG_WIDTH)
    console.print(table)
    low, high = report.supported
    console.print(f"the log supports target returns of {low:.4g} .. {high:.4g} at most of its starts")
    best = report.best_target
    console.print(
        "no target return can be recommended: see the verdicts"
        if best is None
        else f"recommended: --target-return {show_target(best)}, which --target-return auto means"
    )


@cache
def terminal() -> Console:
    """The console on stderr, shared so that lines are printed above a live bar or table."""
    from rich.console import Console

    return Console(stderr=True)


def _held_out_table(report: EvaluationReport, held_out: HeldOutResult) -> Table:
    from rich.table import Table

    table = Table(
        title=f"{report.num_episodes} held-out episodes, {held_out.num_steps} steps, after {report.step} updates: "
        f"error of actions (1: half of the width of their bounds)"
    )
    table.add_column("steps")
    for column in ("the policy", "linear cloning", "mean action"):
        table.add_column(column, justify="right")
    for name, errors in held_out.rows():
        table.add_row(name, *(f"{error:.4f}" for error in errors))
    return table


class TerminalHandler(logging.Handler):
    """Writes log lines to the terminal."""

    def emit(self, record: logging.LogRecord) -> None:
        prefix = "warning: " if record.levelno >= logging.WARNING else ""
        terminal().out(prefix + self.format(record), highlight=False)

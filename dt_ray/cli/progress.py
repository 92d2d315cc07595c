"""Shows the progress of a run by reading its files: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from dt_ray.cli.command import terminal
from dt_ray.config.schema import RunConfig
from dt_ray.config.targets import show_target
from dt_ray.errors import StorageError
from dt_ray.runs.evaluation_report import EvaluationReport
from dt_ray.runs.folder import RunFolder
from dt_ray.runs.metrics import MetricsTail
from dt_ray.runs.storage import Stamp
from dt_ray.sweeps.config import SweepConfig, value_of
from dt_ray.sweeps.folder import SweepFolder, result_of

POLL_S = 0.5
POLL_OBJECT_STORE_S = 5.0
PLAIN_LINE_EVERY_S = 5.0
COLUMNS = ("trial", "status", "updates", "loss")


@contextmanager
def progress(config: RunConfig) -> Iterator[None]:
    """Shows the run's progress on stderr while the block runs."""
    with _watched_by(Watcher(config)):
        yield


@contextmanager
def sweep_progress(sweep: SweepConfig) -> Iterator[None]:
    """Shows a sweep's trials on stderr while the block runs."""
    with _watched_by(SweepWatcher(sweep)):
        yield


@contextmanager
def _watched_by(watcher: Watcher | SweepWatcher) -> Iterator[None]:
    thread = threading.Thread(target=watcher.watch, daemon=True, name="progress")
    thread.start()
    try:
        yield
    finally:
        watcher.stop.set()
        thread.join()


class Watcher:
    """Reads what is new in `metrics.jsonl` and `evaluations/`, wherever the run itself takes place."""

    def __init__(self, config: RunConfig) -> None:
        self.config, self.run = config, RunFolder.of(config)
        self.stop = threading.Event()
        self.is_live = sys.stderr.isatty()
        self.bar: Progress | None = None  # made when there is something to show
        self.newest: dict[str, Any] = {}
        self.last_return = ""
        self.metrics = MetricsTail(self.run.metrics_file)
        self.metrics.new_lines()  # skips the lines of a run that is resumed or replaced
        self.evaluated: set[str] = set(self.run.evaluations.names())
        self.last_line, self.shown_step = 0.0, 0

    def watch(self) -> None:
        every = POLL_S if self.run.folder.is_local else POLL_OBJECT_STORE_S
        going_on = True
        while going_on:
            going_on = not self.stop.wait(every)
            with suppress(StorageError):  # the run itself reports it
                self.look()
        if self.bar is not None:
            self.bar.stop()

    def look(self) -> None:
        """Shows what is new."""
        lines, names = self.metrics.new_lines(), self.run.evaluations.names()
        self.evaluated &= set(names)  # a replaced run writes them again
        for name in names:
            if name.endswith(".json") and not name.startswith(".") and name not in self.evaluated:
                self.evaluated.add(name)
                report = EvaluationReport.from_json((self.run.evaluations / name).read_text())
                score = f"{report.score:.1f}" if report.held_out is None else f"{report.held_out.action_error:.4f}"
                kind = "return" if report.held_out is None else "action error"
                self.last_return = f"{kind} {score} at {report.step}"
                self._say(_evaluation_line(report))
        if not lines:
            return
        self.newest = lines[-1]
        if self.newest["step"] == self.shown_step:
            return
        step, total = self.newest["step"], self.config.total_timesteps
        if step < self.shown_step:
            workers = f"{self.newest['time/workers']} worker(s)"
            self._say(f"after update {self.shown_step}, resumed from a checkpoint at update {step} with {workers}")
            self.last_line = 0.0
        rate, loss = self.newest["time/updates_per_s"], self.newest["train/loss"]
        if self.is_live:
            self._show(step, text=f"{rate:.1f} updates/s  loss {loss:.4f}  {self.last_return}")
        elif step == total or time.monotonic() - self.last_line >= PLAIN_LINE_EVERY_S:
            self._say(
                f"update {step}/{total}  {rate:.1f} updates/s  loss {loss:.4f}  "
                f"about {(total - step) / rate:.0f} s left"
            )
            self.last_line = time.monotonic()
        self.shown_step = step

    def _show(self, step: int, *, text: str) -> None:
        if self.bar is None:
            count = TextColumn("update {task.completed}/{task.total}")
            columns = (count, BarColumn(), TimeRemainingColumn(), TextColumn("{task.fields[text]}", markup=False))
            self.bar = Progress(*columns, console=terminal(), refresh_per_second=2)
            self.bar.add_task("", total=self.config.total_timesteps, completed=step, text=text)
            self.bar.start()
        self.bar.update(self.bar.task_ids[0], completed=step, text=text)  # may go back, where updates are made again

    def _say(self, line: str) -> None:
        terminal().out(line, highlight=False)


class SweepWatcher:
    """Reads what the trials' runs write: a live table of them on a terminal, a line for each that ends elsewhere."""

    def __init__(self, sweep: SweepConfig) -> None:
        self.sweep, self.folder = sweep, SweepFolder.of(sweep)
        # In a population a trial that stops goes on from another one's checkpoint.
        stopped = set() if sweep.settings.scheduler == "pbt" else {"stopped"}
        self.final = {"finished", "failed", "diverged"} | stopped
        self.num_trials = sweep.num_trials  # which draws them all
        self.outcome = "best return" if sweep.base.env_id is not None else "action error"
        self.stop = threading.Event()
        self.rows: dict[str, tuple[str, ...]] = {}
        self.trials: dict[str, TrialWatcher] = {}
        self.ended = {name for name in self.folder.trial_names() if self._row(name)[1] in self.final}  # before a resume

    def watch(self) -> None:
        every = 2 * POLL_S if self.folder.folder.is_local else POLL_OBJECT_STORE_S
        live = Live(console=terminal(), refresh_per_second=2) if sys.stderr.isatty() else None
        with live or nullcontext():
            going_on = True
            while going_on:
                going_on = not self.stop.wait(every)
                with suppress(StorageError, ValueError, FileNotFoundError):  # a file is just being replaced
                    self.look()
                    if live is not None:
                        live.update(self.table())

    def look(self) -> None:
        """Reads the trials that have not ended; says which have."""
        for name in self.folder.trial_names():
            if name not in self.ended:
                self.rows[name] = self._row(name)
                if self.rows[name][1] in self.final:
                    self.ended.add(name)
                    if not sys.stderr.isatty():
                        print(self._line(name), file=sys.stderr)

    def table(self) -> Table:
        table = Table(title=f"{self.folder.folder.name}: {len(self.ended)} of {self.num_trials} trials ended")
        for column in (*COLUMNS, self.outcome, *(axis.key for axis in self.sweep.training_axes)):
            table.add_column(column)
        for row in self.rows.values():
            table.add_row(*row)
        return table

    def _line(self, name: str) -> str:
        _, status, updates, loss, best, *values = self.rows[name]
        keys = [axis.key for axis in self.sweep.training_axes]
        chosen = "  ".join(f"{key}={value}" for key, value in zip(keys, values, strict=True))
        what = f"after {updates} updates, loss {loss}, {self.outcome} {best}"
        return f"trial {len(self.ended)}/{self.num_trials} {status} {what}  {chosen}"

    def _row(self, name: str) -> tuple[str, ...]:
        trial = self.trials.setdefault(name, TrialWatcher(self.folder.trial(name), self.sweep))
        return name, *trial.row()


class TrialWatcher:
    """A trial's row in the table, read again when its files have changed."""

    def __init__(self, run: RunFolder, sweep: SweepConfig) -> None:
        self.run, self.axes = run, sweep.training_axes
        self.metrics = MetricsTail(run.metrics_file)
        self._newest: dict[str, Any] = {}
        self._stamps: dict[str, Stamp] = {}
        self._row = self._starting

    @property
    def _starting(self) -> tuple[str, ...]:
        return "starting", "", "", "", *("" for _ in self.axes)

    def row(self) -> tuple[str, ...]:
        """Status, updates, loss, best return or action error, and the values that are swept."""
        stamps = self.run.folder.stamps() | self.run.evaluations.stamps()
        if stamps != self._stamps:
            self._row = self._read() if "config.yaml" in stamps else self._starting
            self._stamps = stamps
        return self._row

    def _read(self) -> tuple[str, ...]:
        config = self.run.read_config()
        status, report = result_of(self.run)
        if lines := self.metrics.new_lines():
            self._newest = lines[-1]
        return (
            "training" if status == "unfinished" else status,
            str(max(self._newest.get("step", 0), report.step if report else 0)),
            f"{self._newest['train/loss']:.4f}" if self._newest else "",
            _outcome(report) if report else "",
            *(f"{value:.4g}" if isinstance(value, float) else str(value)
              for value in (value_of(config, axis.key) for axis in self.axes)),
        )  # fmt: skip


def _outcome(report: EvaluationReport) -> str:
    return f"{report.highest_mean:.1f}" if report.held_out is None else f"{report.held_out.action_error:.4f}"


def _evaluation_line(report: EvaluationReport) -> str:
    results = "  ".join(f"{show_target(target)} → {mean:.1f}" for target, mean in report.return_means.items())
    if (held_out := report.held_out) is not None:
        results = (
            f"action error {held_out.action_error:.4f}  (linear cloning {held_out.cloning_error:.4f}, mean action "
            f"{held_out.constant_error:.4f})"
        )
    return f"evaluation at update {report.step}: {results}"

"""Watching a run by the files it writes: a live bar on a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from tqdm import tqdm

from dt_ray.config import RunConfig
from dt_ray.errors import StorageError
from dt_ray.runs import RunFolder

POLL_S = 0.5
POLL_OBJECT_STORE_S = 5.0
PLAIN_LINE_EVERY_S = 5.0


@contextmanager
def progress(config: RunConfig) -> Iterator[None]:
    """Shows the run's progress on stderr while the block runs."""
    watcher = Watcher(config)
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
        self.bar: tqdm | None = None
        self.newest: dict[str, Any] = {}
        self.before = self._lines()  # of a run that is resumed or replaced: nothing new
        self.evaluated: set[str] = set(self.run.evaluations.names())
        self.last_line, self.shown_step = 0.0, 0

    def watch(self) -> None:
        every = POLL_S if self.run.folder.is_local else POLL_OBJECT_STORE_S
        going_on = True
        while going_on:
            going_on = not self.stop.wait(every)
            with suppress(StorageError):  # of which the run itself has to say something
                self.look()
        if self.bar is not None:
            self.bar.close()

    def look(self) -> None:
        """Shows what is new."""
        lines, names = self._lines(), self.run.evaluations.names()
        self.evaluated &= set(names)  # a replaced run writes them again
        for name in names:
            if name.endswith(".json") and not name.startswith(".") and name not in self.evaluated:
                self.evaluated.add(name)
                self._say(_evaluation_line(json.loads((self.run.evaluations / name).read_text())))
        if not lines or lines == self.before:
            return
        self.newest = json.loads(lines[-1])
        if self.newest["step"] == self.shown_step:
            return
        step, total = self.newest["step"], self.config.total_timesteps
        if step < self.shown_step:
            workers = f"{self.newest['time/workers']} worker(s)"
            self._say(f"went back to a checkpoint after update {self.shown_step}, on with {workers} at update {step}")
            self.last_line = 0.0
        if self.is_live:
            if self.bar is None:
                self.bar = tqdm(total=total, initial=step, unit="update", file=sys.stderr, dynamic_ncols=True)
            self.bar.update(step - self.bar.n)  # back, too, where updates are made again
            self.bar.set_postfix(loss=f"{self.newest['train/loss']:.4f}")
        elif step == total or time.monotonic() - self.last_line >= PLAIN_LINE_EVERY_S:
            rate = self.newest["time/updates_per_s"]
            self._say(
                f"update {step}/{total}  {rate:.1f} updates/s  loss {self.newest['train/loss']:.4f}  "
                f"about {(total - step) / rate:.0f} s left"
            )
            self.last_line = time.monotonic()
        self.shown_step = step

    def _lines(self) -> list[str]:
        """The whole lines of `metrics.jsonl` that are there by now."""
        try:
            return [line for line in self.run.metrics_file.read_text().splitlines() if line.endswith("}")]
        except FileNotFoundError:
            return []

    def _say(self, line: str) -> None:
        tqdm.write(line, file=sys.stderr)


def _evaluation_line(report: dict[str, Any]) -> str:
    results = "  ".join(f"{t['target_return']:g} → {t['return_mean']:.1f}" for t in report["targets"])
    return f"evaluation at update {report['step']}: {results}"

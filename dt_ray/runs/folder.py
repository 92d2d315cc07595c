"""A run on disk: `runs/NAME/` with its configuration, metrics, checkpoints, evaluations and summary."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from typing import Any

from pyarrow import fs

from dt_ray.config.loading import decode_config, parse_yaml, to_yaml
from dt_ray.config.schema import RunConfig
from dt_ray.errors import ConfigError, RunError
from dt_ray.runs.checkpoint import checkpoint_fault, checkpoint_name
from dt_ray.runs.evaluation_report import EvaluationReport, best_of
from dt_ray.runs.lease import Lease, check_new, clear
from dt_ray.runs.offline_report import OfflineReport
from dt_ray.runs.provenance import describe_environment
from dt_ray.runs.storage import Folder, Stamp
from dt_ray.runs.writing import to_json

RECOMMENDED = "recommended"  # among the checkpoints: the one whose estimates from the log are highest


class RunFolder:
    """The files of one run, by name."""

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        self.metrics_file = folder / "metrics.jsonl"
        self.checkpoints = folder / "checkpoints"
        self.evaluations = folder / "evaluations"
        # Checkpoints that were found complete are not read again until their files change.
        self._sound: dict[int, dict[str, Stamp]] = {}
        # Evaluations by file name; the stamp is None for a file that was written here and not listed since.
        self._reports: dict[str, tuple[Stamp | None, EvaluationReport]] = {}

    @classmethod
    def of(cls, config: RunConfig) -> RunFolder:
        assert config.name is not None, "a run is named before it starts"
        return cls(Folder.at(config.storage_path) / config.name)

    def __str__(self) -> str:
        return str(self.folder)

    def check_free(self) -> None:
        """Raises:
        RunError: a run of this name exists, or another process makes it.
        """
        Lease(self.folder).check_free()
        check_new(self.folder)

    def create(self, config: RunConfig, *, overwrite: bool = False) -> None:
        """Makes the folder with the configuration and the environment in it.

        Raises:
            RunError: something of this name exists and may not be replaced.
            StorageError: the storage can't be written.
        """
        if overwrite:
            clear(self.folder, kind="run", known_by="config.yaml")
        else:
            check_new(self.folder)
        self.write_config(config)

    def check_writable(self) -> None:
        """Raises:
        RunError: another process writes the run, or the sweep that it is a trial of.
        """
        Lease(self.folder).check_free()
        if self.folder.parent.name == "trials":
            Lease(self.folder.parent.parent).check_free()

    def write_config(self, config: RunConfig) -> None:
        """Writes `config.yaml` and `environment.json` at a start or a resume, and deletes an old `error.txt`."""
        (self.folder / "error.txt").delete()
        (self.folder / "config.yaml").write_text(to_yaml(config))
        (self.folder / "environment.json").write_text(json.dumps(describe_environment(config), indent=2) + "\n")

    def read_config(self) -> RunConfig:
        """The configuration that the run was started with."""
        try:
            text = (self.folder / "config.yaml").read_text()
        except FileNotFoundError:
            raise RunError(f"{self} is no run: there is no config.yaml in it") from None
        return decode_config(parse_yaml(text, source=f"{self}/config.yaml"))

    def checkpoint(self, step: int) -> Folder:
        return self.checkpoints / checkpoint_name(step)

    def checkpoint_steps(self) -> list[int]:
        """The steps of all checkpoints, complete or not, oldest first."""
        names = [name.removeprefix("step-") for name in self.checkpoints.names() if name.startswith("step-")]
        return sorted(int(name) for name in names if name.isdigit())

    def latest_checkpoint(self) -> tuple[Folder | None, list[str]]:
        """The newest checkpoint that is complete and undamaged, and the faults of the newer ones."""
        faults = []
        for step in reversed(self.checkpoint_steps()):
            if (fault := checkpoint_fault(self.checkpoint(step))) is None:
                return self.checkpoint(step), faults
            faults.append(fault)
        return None, faults

    def mark_latest(self, step: int) -> None:
        (self.checkpoints / "latest").write_text(checkpoint_name(step) + "\n")

    def prune_checkpoints(self, *, keep: int, spared: set[int]) -> None:
        """Deletes what is older than the `keep` newest complete checkpoints, but neither those in `spared` nor the one
        that `latest` names.

        Damaged checkpoints don't count: they never take the place of complete ones.
        """
        steps, num_kept = self.checkpoint_steps(), 0
        while steps and num_kept < keep:
            num_kept += self._is_sound(steps.pop())
        if not set(steps) - spared:
            return
        latest = self._named_latest()
        for step in steps:
            if step not in spared and checkpoint_name(step) != latest:
                self.checkpoint(step).delete()
                self._sound.pop(step, None)

    def _is_sound(self, step: int) -> bool:
        """Whether a checkpoint is complete and undamaged; it is only read again if its files have changed."""
        stamps = self.checkpoint(step).stamps(recursive=True)
        if self._sound.get(step) != stamps and checkpoint_fault(self.checkpoint(step)) is None:
            self._sound[step] = stamps
        return self._sound.get(step) == stamps

    def _named_latest(self) -> str | None:
        try:
            return (self.checkpoints / "latest").read_text().strip()
        except FileNotFoundError:
            return None

    def discard_after(self, step: int) -> None:
        """Deletes the checkpoints and evaluations of later updates: the run goes on from other weights at `step`."""
        for later in self.checkpoint_steps():
            if later > step:
                self.checkpoint(later).delete()
        for name in self.evaluations.names():
            if name.removeprefix("offline-") > f"{checkpoint_name(step)}.json":
                self._reports.pop(name, None)
                (self.evaluations / name).delete()

    def evaluation(self, step: int) -> Folder:
        """The file of the evaluation at a step."""
        return self.evaluations / f"{checkpoint_name(step)}.json"

    def has_evaluation(self, step: int) -> bool:
        return self.evaluation(step).exists()

    def read_evaluation(self, step: int) -> EvaluationReport:
        return EvaluationReport.from_json(self.evaluation(step).read_text())

    def write_evaluation(self, report: EvaluationReport) -> None:
        file = self.evaluation(report.step)
        self._reports.pop(file.name, None)
        file.write_text(report.to_json())
        self._reports[file.name] = None, report

    def read_evaluations(self, *, up_to: int | None = None) -> list[EvaluationReport]:
        """The evaluations at steps up to `up_to`, oldest first; only those that others wrote are read, and once."""
        reports = []
        for name, stamp in self.evaluations.stamps().items():
            if _is_evaluation(name):
                known_at, report = self._reports.get(name, (None, None))
                if report is None or known_at not in (None, stamp):
                    report = EvaluationReport.from_json((self.evaluations / name).read_text())
                self._reports[name] = stamp, report
                reports.append(report)
        return [report for report in reports if up_to is None or report.step <= up_to]

    def read_offline(self, step: int) -> OfflineReport | None:
        """The estimates from the log alone for the policy at a step, if they were made."""
        try:
            return OfflineReport.from_json(self.offline(step).read_text())
        except FileNotFoundError:
            return None

    def newest_offline(self) -> OfflineReport | None:
        """The estimates for the policy at the latest step that has some."""
        return max(self._offline_reports(), key=lambda report: report.step, default=None)

    def recommended_offline(self) -> OfflineReport | None:
        """The estimates with the highest score, the newest of equal ones, of those whose checkpoints are there."""
        scored = [(report.score, report.step, report) for report in self._offline_reports() if report.score is not None]
        there = [each for each in scored if self.checkpoint(each[1]).exists()]
        return max(there, key=lambda each: each[:2])[2] if there else None

    def _offline_reports(self) -> list[OfflineReport]:
        names = [name for name in self.evaluations.names() if name.startswith("offline-step-")]
        return [OfflineReport.from_json((self.evaluations / name).read_text()) for name in names]

    def write_offline(self, report: OfflineReport) -> None:
        self.offline(report.step).write_text(report.to_json())

    def offline(self, step: int) -> Folder:
        """The file of the estimates from the log alone, at a step."""
        return self.evaluations / f"offline-{checkpoint_name(step)}.json"

    def best_evaluation(self, *, up_to: int | None = None) -> EvaluationReport | None:
        """The best evaluation at steps up to `up_to`."""
        return best_of(self.read_evaluations(up_to=up_to))

    def write_summary(self, *, status: str, step: int, **values: Any) -> dict[str, Any]:
        """Writes `summary.json` with the last and the best evaluation beside `values`, and what estimates recommend."""
        reports = self.read_evaluations(up_to=step)
        best, recommended = best_of(reports), self.recommended_offline()
        summary = {
            "status": status,
            "step": step,
            **values,
            "last": reports[-1].to_dict() if reports else None,
            "best": best.to_dict() if best else None,
        }
        if recommended is not None:
            summary["recommended"] = recommended.to_recommendation()
        (self.folder / "summary.json").write_text(to_json(summary, indent=1))
        return summary

    def renew_summary(self) -> dict[str, Any]:
        """Writes `summary.json` again, with the evaluations and estimates that are there now."""
        found = self.read_summary() or {}
        return self.write_summary(**{key: found[key] for key in found if key not in ("last", "best", "recommended")})

    def read_summary(self) -> dict[str, Any] | None:
        """The content of `summary.json`; None while there is none."""
        try:
            return json.loads((self.folder / "summary.json").read_text())
        except FileNotFoundError:
            return None


def _is_evaluation(name: str) -> bool:
    return name.startswith("step-") and name.endswith(".json")


def default_name(config_name: str) -> str:
    """A name that no other run has: the configuration's and the time."""
    return f"{config_name.rpartition('/')[2].removesuffix('.yaml')}-{time.strftime('%Y%m%d-%H%M%S')}"


def run_of(checkpoint: Folder) -> RunFolder | None:
    """The run that a checkpoint lies in, if it lies in one."""
    return RunFolder(checkpoint.parent.parent) if checkpoint.parent.name == "checkpoints" else None


def checkpoint_at(place: Folder) -> Folder:
    """The checkpoint meant by a run's folder (its newest complete one), by a checkpoint's own or by `recommended`.

    Raises:
        RunError: there is none.
    """
    if place.name == RECOMMENDED and (run := run_of(place)) is not None:
        report = run.recommended_offline()
        if report is None:
            raise RunError(
                f"no checkpoint of {run} is recommended: none was estimated, or no estimate can be believed; see "
                f"python -m dt_ray.evaluate {run} --offline"
            )
        return run.checkpoint(report.step)
    if (place / "policy").exists() or (place / "MANIFEST.json").exists():
        return place
    if not place.exists():
        raise RunError(f"no run or checkpoint at {place}")
    found, faults = RunFolder(place).latest_checkpoint()
    if found is None:
        raise RunError("\n  ".join([f"{place} has no complete checkpoint", *faults]))
    return found


def with_values_checkpoint(config: RunConfig) -> RunConfig:
    """The configuration with its `data.values`, a run, as that run's newest checkpoint.

    Raises:
        ConfigError: it is no run.
        RunError: the run has no complete checkpoint.
    """
    if not config.relabels:
        return config
    assert config.data.values is not None
    if (place := Folder.at(config.data.values)).kind() != fs.FileType.Directory:
        raise ConfigError(
            f"data.values: there is no run at {config.data.values}; give the folder of a run or checkpoint of iql, "
            f"which `python -m dt_ray.train --config iql/pendulum_values`, for one, makes"
        )
    return replace(config, data=replace(config.data, values=str(checkpoint_at(place))))

"""A sweep on disk: `sweeps/NAME/` with its settings, a run for each trial, their results and the best of them."""

from __future__ import annotations

import csv
import io
import json
import math
import shlex
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dt_ray.config.loading import parse_yaml
from dt_ray.config.schema import EvaluationConfig
from dt_ray.data.spaces import needed_environment
from dt_ray.errors import ConfigError, RunError
from dt_ray.play.evaluation import evaluate
from dt_ray.runs.checkpoint import checkpoint_name, load_policy
from dt_ray.runs.evaluation_report import EvaluationReport
from dt_ray.runs.folder import RunFolder
from dt_ray.runs.intervals import student_interval
from dt_ray.runs.lease import FILE as LEASE
from dt_ray.runs.lease import Lease
from dt_ray.runs.storage import Folder
from dt_ray.sweeps.config import SweepConfig, decode_sweep, value_of

Row = dict[str, Any]
# Where things are and how many may run: nothing that a trial's results depend on.
KEYS_CHANGED_ON_RESUME = ("data.path", "data.values", "data.mix", "evaluation.max_envs", "max_concurrent")


class SweepFolder:
    """The files of one sweep, by name."""

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        self.trials = folder / "trials"

    @classmethod
    def of(cls, sweep: SweepConfig) -> SweepFolder:
        assert sweep.base.name is not None, "a sweep is named before it starts"
        return cls(Folder.at(sweep.base.storage_path) / sweep.base.name)

    def __str__(self) -> str:
        return str(self.folder)

    def check_free(self) -> None:
        """Raises:
        RunError: a sweep of this name exists, or another process makes it.
        """
        Lease(self.folder).check_free()
        self._check_new()

    def _check_new(self) -> None:
        if self.folder.exists() and self.folder.names() != [LEASE]:
            raise RunError(
                f"{self} exists already; choose another name=…, go on with --resume {self}, "
                f"or replace it with --overwrite"
            )

    def create(self, sweep: SweepConfig, *, overwrite: bool = False) -> None:
        """Makes the folder with `sweep.yaml` in it.

        Raises:
            RunError: something of this name exists and may not be replaced.
        """
        if not overwrite:
            self._check_new()
        elif self.folder.exists():
            if not self.is_sweep() and self.folder.names() != [LEASE]:
                raise RunError(f"{self} exists and is no sweep; --overwrite replaces sweeps only")
            for name in self.folder.names():
                if name != LEASE:  # whoever creates the sweep holds it
                    (self.folder / name).delete()
        self.write(sweep)

    def is_sweep(self) -> bool:
        return (self.folder / "sweep.yaml").exists()

    def write(self, sweep: SweepConfig) -> None:
        """Writes `sweep.yaml`."""
        (self.folder / "sweep.yaml").write_text(sweep.to_yaml())

    def read(self, overrides: Sequence[str] = ()) -> SweepConfig:
        """The sweep as it was started, wherever its folder is now; `overrides` say where what it needs is now.

        Raises:
            RunError: the folder is no sweep.
            ConfigError: an override is wrong, or changes what its trials have in common.
        """
        if not self.is_sweep():
            raise RunError(f"{self} is no sweep: there is no sweep.yaml in it")
        tree = parse_yaml((self.folder / "sweep.yaml").read_text(), source=f"{self}/sweep.yaml")
        config = tree.pop("config") | {"storage_path": self.folder.parent.uri, "name": self.folder.name}
        changed = [override.partition("=")[0] for override in overrides]
        if fixed := [key for key in changed if key not in KEYS_CHANGED_ON_RESUME]:
            raise ConfigError(
                f"a resumed sweep keeps its {', '.join(fixed)}; it takes {', '.join(KEYS_CHANGED_ON_RESUME)}; start a "
                f"new sweep to change the rest"
            )
        return decode_sweep(tree, config, overrides, default_name=self.folder.name)

    def trial_names(self) -> list[str]:
        return [name for name in self.trials.names() if not name.startswith(".")]

    def trial(self, name: str) -> RunFolder:
        return RunFolder(self.trials / name)

    def further_evaluation(self, name: str, number: int, step: int) -> Folder:
        """The file of a trial's evaluation under other settings than those it was trained with."""
        return self.folder / "evaluations" / name / f"{number}-{checkpoint_name(step)}.json"


def result_of(run: RunFolder) -> tuple[str, EvaluationReport | None]:
    """A trial's status, and its newest evaluation."""
    if (run.folder / "error.txt").exists():
        return "failed", None
    reports = run.read_evaluations()
    summary = run.read_summary()
    return (summary["status"] if summary else "unfinished"), (reports[-1] if reports else None)


def further_evaluations(sweep: SweepConfig, folder: SweepFolder) -> list[tuple[str, EvaluationConfig, Folder]]:
    """What is still to be evaluated: checkpoints, under which settings, and the files for the reports."""
    missing = []
    for name in folder.trial_names():
        run = folder.trial(name)
        _, report = result_of(run)
        if report is None:
            continue
        for number, evaluation in enumerate(sweep.evaluations(run.read_config())[1:], start=1):
            file = folder.further_evaluation(name, number, report.step)
            if not file.exists():
                missing.append((run.checkpoint(report.step).uri, evaluation, file))
    return missing


def evaluate_checkpoint(checkpoint: str, evaluation: EvaluationConfig) -> EvaluationReport:
    """The report on a checkpoint under these settings, played in this process."""
    policy, facts = load_policy(Folder(checkpoint), evaluation)
    env_id = needed_environment(facts.env_id, "an evaluation of another kind")
    return evaluate(policy, env_id, evaluation, step=facts.step, env_kwargs=facts.env_kwargs)


def read_rows(sweep: SweepConfig, folder: SweepFolder) -> list[Row]:
    """The rows of `trials.csv`: a trial x evaluation setting x target return each."""
    return [row for name in folder.trial_names() for row in _rows_of(sweep, folder, name)]


def _rows_of(sweep: SweepConfig, folder: SweepFolder, name: str) -> list[Row]:
    run = folder.trial(name)
    status, report = result_of(run)
    try:
        config = run.read_config()
    except RunError:  # it ended before it began
        return [{"trial": name, "status": status}]
    summary = run.read_summary() or {}
    trained = {axis.key: value_of(config, axis.key) for axis in sweep.training_axes}
    common = {"trial": name, "status": status, **trained, "seed": config.seed}
    if report is None:
        return [common]
    rows = []
    for number, evaluation in enumerate(sweep.evaluations(config)):
        if number:
            file = folder.further_evaluation(name, number, report.step)
            if not file.exists():
                continue
            report = EvaluationReport.from_json(file.read_text())
        asked = value_of_evaluation(evaluation, sweep)
        if (held_out := report.held_out) is not None:
            errors = {name: getattr(held_out, name) for name in ("action_error", "cloning_error", "constant_error")}
            rows.append({**common, **errors, **_costs(run, report, summary)})
        rows += [
            {
                **common,
                **asked,
                "target_return": target.target_return,
                "return_mean": target.return_mean,
                "return_std": target.return_std,
                "return_ci95_low": target.return_ci95[0],
                "return_ci95_high": target.return_ci95[1],
                "normalized_score": target.normalized_score,
                "obedience_error": target.obedience_error,
                **_costs(run, report, summary),
            }
            for target in report.targets
        ]
    return rows


def value_of_evaluation(evaluation: EvaluationConfig, sweep: SweepConfig) -> Row:
    """The swept settings of an evaluation, by key; its target returns are rows of their own."""
    keys = [axis.key for axis in sweep.axes if axis.is_evaluation and axis.key != "evaluation.target_returns"]
    return {key: getattr(evaluation, key.removeprefix("evaluation.")) for key in keys}


def _costs(run: RunFolder, report: EvaluationReport, summary: Mapping[str, Any]) -> Row:
    return {
        "updates": report.step,
        "train_wall_s": summary.get("train_wall_s"),
        "checkpoint": str(run.checkpoint(report.step)),
    }


def write_table(rows: Sequence[Row], file: Folder) -> None:
    """Writes rows as CSV, empty where a row has no value."""
    columns = dict.fromkeys(key for row in rows for key in row)
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    file.write_text(text.getvalue())


def settings_of(row: Row, sweep: SweepConfig) -> Row:
    """What a row was trained and evaluated with, but for its seed."""
    keys = [axis.key for axis in sweep.axes if axis.key not in ("evaluation.target_returns", "seed")]
    target = {"target_return": row["target_return"]} if "target_return" in row else {}
    return {key: row.get(key) for key in keys} | target


def over_seeds(rows: Sequence[Row], sweep: SweepConfig) -> list[tuple[Row, list[Row]]]:
    """Each setting that was evaluated, with its rows, one a seed."""
    groups: dict[str, tuple[Row, list[Row]]] = {}
    for row in rows:
        if (value := row.get(sweep.settings.metric)) is not None and math.isfinite(value):
            settings = settings_of(row, sweep)
            groups.setdefault(json.dumps(settings), (settings, []))[1].append(row)
    return list(groups.values())


def find_best(rows: Sequence[Row], sweep: SweepConfig) -> dict[str, Any] | None:
    """What `best.json` says, but for the evaluation: the setting that is best on average over its seeds."""
    metric, sign = sweep.settings.metric, 1 if sweep.settings.direction == "max" else -1
    groups = over_seeds(rows, sweep)
    if not groups:
        return None
    most = max(len(found) for _, found in groups)  # seeds: a setting whose other trials failed is not the best
    settings, found = max(
        (group for group in groups if len(group[1]) == most),
        key=lambda group: sign * statistics.fmean(row[metric] for row in group[1]),
    )
    row = max(found, key=lambda row: sign * row[metric])
    values = [each[metric] for each in found]
    return {
        "metric": metric,
        "mode": sweep.settings.direction,
        "settings": settings,
        "num_seeds": len(found),
        "metric_mean": statistics.fmean(values),
        "metric_ci95": student_interval(np.array(values)) if len(values) > 1 else None,
        "metric_by_seed": {str(each["seed"]): each[metric] for each in found},
        "trial": row["trial"],
        "seed": row["seed"],
        "updates": row["updates"],
        "checkpoint": row["checkpoint"],
    }


def evaluate_best(best: Mapping[str, Any], evaluation: EvaluationConfig) -> dict[str, Any]:
    """`best.json`: the best checkpoint evaluated by itself, and the command that does it again to the last digit."""
    (target,) = evaluate_checkpoint(best["checkpoint"], evaluation).targets
    command = ["python", "-m", "dt_ray.evaluate", best["checkpoint"], f"--target-return={target.target_return!r}"]
    command += ["--episodes", str(evaluation.num_episodes), "--seed", str(evaluation.seed)]
    command += ["--max-timesteps", str(evaluation.max_timesteps)]
    if evaluation.context_length is not None:
        command += ["--context-length", str(evaluation.context_length)]
    results = {key: getattr(target, key) for key in ("return_mean", "return_std", "return_ci95", "normalized_score")}
    return {**best, **results, "command": shlex.join(command)}

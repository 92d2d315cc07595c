"""Makes the tables of a sweep from the folders of its trials, and finds the best setting."""

from __future__ import annotations

import json
import math
import shlex
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from dt_ray.config.schema import EvaluationConfig
from dt_ray.config.targets import as_json
from dt_ray.errors import RunError
from dt_ray.runs.evaluation_report import EvaluationReport
from dt_ray.runs.folder import RunFolder
from dt_ray.runs.intervals import student_interval
from dt_ray.runs.offline_report import OfflineReport
from dt_ray.runs.storage import Folder
from dt_ray.sweeps.config import SweepConfig, value_of
from dt_ray.sweeps.folder import SweepFolder, evaluate_checkpoint, result_of

Row = dict[str, Any]


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
    rows, estimates = [], run.read_offline(report.step)  # of the same weights in all evaluations
    for number, evaluation in enumerate(sweep.evaluations(config)):
        if number:
            file = folder.further_evaluation(name, number, report.step)
            if not file.exists():
                continue
            report = EvaluationReport.from_json(file.read_text())
        asked = value_of_evaluation(evaluation, sweep)
        if (held_out := report.held_out) is not None:
            errors = {name: getattr(held_out, name) for name in ("action_error", "cloning_error", "constant_error")}
            rows.append({**common, **errors, **_estimate(estimates), **_costs(run, report, summary)})
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
                **_estimate(estimates, target.target_return),
                **_costs(run, report, summary),
            }
            for target in report.targets
        ]
    return rows


def value_of_evaluation(evaluation: EvaluationConfig, sweep: SweepConfig) -> Row:
    """The swept settings of an evaluation, by key; its target returns are rows of their own."""
    keys = [axis.key for axis in sweep.axes if axis.is_evaluation and axis.key != "evaluation.target_returns"]
    return {key: getattr(evaluation, key.removeprefix("evaluation.")) for key in keys}


def _estimate(report: OfflineReport | None, target_return: float | None = None) -> Row:
    """The estimate from the log alone: at a target return, or at the one that it recommends; nothing where none is."""
    if report is None:
        return {}
    if target_return is None:
        best = None if report.best_target is None else as_json(report.best_target)
        return {"offline_estimate": report.score, "recommended_target_return": best}
    found = [each.estimated_return for each in report.targets if each.target_return == target_return]
    return {"offline_estimate": found[0] if found else None}


def _costs(run: RunFolder, report: EvaluationReport, summary: Mapping[str, Any]) -> Row:
    return {
        "updates": report.step,
        "train_wall_s": summary.get("train_wall_s"),
        "checkpoint": str(run.checkpoint(report.step)),
    }


def write_table(rows: Sequence[Row], file: Folder) -> None:
    """Writes rows as CSV, empty where a row has no value."""
    table = pd.DataFrame(list(rows), dtype=object)  # a whole number stays one beside missing values
    file.write_text(table.to_csv(index=False, lineterminator="\n"))


def settings_of(row: Row, sweep: SweepConfig) -> Row:
    """The swept settings of a row, without its seed."""
    keys = [axis.key for axis in sweep.axes if axis.key not in ("evaluation.target_returns", "seed")]
    target = {"target_return": row["target_return"]} if "target_return" in row else {}
    return {key: row.get(key) for key in keys} | target


@dataclass(frozen=True, kw_only=True)
class SettingResult:
    """A setting that was evaluated, over its seeds."""

    settings: Row
    rows: list[Row]  # one a seed
    mean: float  # of the sweep's metric
    interval: list[float] | None  # 95%, of the mean; None of one seed


def over_seeds(rows: Sequence[Row], sweep: SweepConfig) -> list[SettingResult]:
    """Each setting that was evaluated, by the rows whose metric is a number."""
    metric = sweep.settings.metric
    found: dict[str, list[Row]] = {}
    for row in rows:
        if (value := row.get(metric)) is not None and math.isfinite(value):
            found.setdefault(json.dumps(settings_of(row, sweep)), []).append(row)
    results = []
    for group in found.values():
        values = [row[metric] for row in group]
        interval = student_interval(np.array(values)).tolist() if len(values) > 1 else None
        results.append(
            SettingResult(
                settings=settings_of(group[0], sweep), rows=group, mean=statistics.fmean(values), interval=interval
            )
        )
    return results


def find_best(rows: Sequence[Row], sweep: SweepConfig) -> dict[str, Any] | None:
    """The setting that is best on average over its seeds, as `best.json` has it, without the evaluation."""
    metric, sign = sweep.settings.metric, 1 if sweep.settings.direction == "max" else -1
    groups = over_seeds(rows, sweep)
    if not groups:
        return None
    most = max(len(each.rows) for each in groups)  # seeds: a setting whose other trials failed is not the best
    found = max((each for each in groups if len(each.rows) == most), key=lambda each: sign * each.mean)
    row = max(found.rows, key=lambda row: sign * row[metric])
    recommended = {key: row[key] for key in ("recommended_target_return",) if row.get(key) is not None}
    return {
        "metric": metric,
        "mode": sweep.settings.direction,
        "settings": found.settings,
        "num_seeds": len(found.rows),
        "metric_mean": found.mean,
        "metric_ci95": found.interval,
        "metric_by_seed": {str(each["seed"]): each[metric] for each in found.rows},
        "trial": row["trial"],
        "seed": row["seed"],
        "updates": row["updates"],
        "checkpoint": row["checkpoint"],
        **recommended,
    }


def evaluate_best(best: Mapping[str, Any], evaluation: EvaluationConfig) -> dict[str, Any]:
    """The content of `best.json`: the evaluation of the best checkpoint, and the command that repeats it exactly."""
    (target,) = evaluate_checkpoint(best["checkpoint"], evaluation).to_dict()["targets"]
    command = ["python", "-m", "dt_ray.evaluate", best["checkpoint"], f"--target-return={target['target_return']}"]
    command += ["--episodes", str(evaluation.num_episodes), "--seed", str(evaluation.seed)]
    command += ["--max-timesteps", str(evaluation.max_timesteps)]
    if evaluation.context_length is not None:
        command += ["--context-length", str(evaluation.context_length)]
    results = {key: target[key] for key in ("return_mean", "return_std", "return_ci95", "normalized_score")}
    settings = best["settings"] | {"target_return": target["target_return"]}  # `max` is no number in JSON
    return {**best, "settings": settings, **results, "command": shlex.join(command)}

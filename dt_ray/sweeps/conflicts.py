"""Finds the problems of a sweep before anything is trained: one line each."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Mapping
from typing import Any

from dt_ray.config.loading import dotted_keys
from dt_ray.config.schema import RunConfig
from dt_ray.errors import ConfigError
from dt_ray.sweeps.config import ESTIMATE, EVALUATION_KEYS, SweepConfig, configure

# The settings that population-based training may change in the middle of a training.
MUTABLE_KEYS = ("optim.learning_rate", "optim.gradient_clip", "data.return_noise")


def axis_problem(key: str, kind: str, choices: Any) -> str | None:
    """Why a setting can't vary over these choices; None where it can."""
    known = dotted_keys(RunConfig)
    if key not in known and not key.startswith("algorithm_settings."):
        close = difflib.get_close_matches(key, known, n=1)
        return f"{key}: no such key" + (f"; did you mean {close[0]}?" if close else "")
    if key in ("name", "storage_path"):
        return f"{key}: every trial has its own, it can't be swept"
    if key in ("env_kwargs", "data.action_bounds"):
        return f"{key}: all trials act in one environment within the same bounds, it can't be swept"
    if not isinstance(choices, list) or not choices:
        return f"{key}: {kind} takes a list, got {choices!r}"
    if kind in ("grid", "choice"):
        return None
    if key in EVALUATION_KEYS:
        return f"{key}: only evaluations read it: all of its values are evaluated, give them by grid"
    numbers = [each for each in choices if isinstance(each, int | float) and not isinstance(each, bool)]
    if len(numbers) != 2 or len(choices) != 2 or not numbers[0] < numbers[1]:
        return f"{key}: {kind} takes [low, high], got {choices!r}"
    if kind == "log_uniform" and numbers[0] <= 0:
        return f"{key}: log_uniform takes numbers above 0, got {choices!r}"
    return None


def conflicts_of(sweep: SweepConfig) -> list[str]:
    """One line for each rule between settings that the sweep breaks."""
    settings, base = sweep.settings, sweep.base
    drawn = [axis for axis in sweep.training_axes if axis.kind != "grid"]
    problems = []
    if settings.num_samples > 1 and not drawn and not sweep.is_searched:
        problems.append(
            f"num_samples: every training key is a grid, there is nothing to draw {settings.num_samples} of"
        )
    if settings.num_seeds > 1 and any(axis.key == "seed" for axis in sweep.axes):
        problems.append("num_seeds: seed is swept already; leave one of them out")
    if settings.scheduler != "none" and base.evaluation.every == 0:
        problems.append(
            f"scheduler: {settings.scheduler} looks at evaluations on the way; set evaluation.every to the updates "
            f"between them, got 0"
        )
    if settings.metric == "normalized_score" and base.evaluation.reference_return is None:
        problems.append("metric: normalized_score needs evaluation.random_return and evaluation.reference_return")
    if settings.metric == ESTIMATE and (settings.scheduler != "none" or settings.search != "random"):
        problems.append(
            f"metric: {ESTIMATE} is known when all trials have ended; it goes with scheduler=none and search=random"
        )
    if settings.metric != ESTIMATE and (settings.metric == "action_error") != (base.env_id is None):
        allowed = "action_error or offline_estimate" if base.env_id is None else "of returns reached in it"
        problems.append(f"metric: with env_id={base.env_id} it is {allowed}, got {settings.metric}")
    if base.env_id is None and base.data.validation_fraction == 0:
        problems.append("data.validation_fraction: without an environment trials are compared on held-out episodes")
    if base.env_id is None and (asked := [axis.key for axis in sweep.axes if axis.is_evaluation]):
        problems.append(f"{', '.join(asked)}: only an environment is evaluated in several ways, and there is none")
    if base.scaling.is_elastic:
        problems.append("scaling.num_workers: trials have a fixed number of workers, got [min, max]")
    if settings.scheduler == "pbt":
        keys = [axis.key for axis in sweep.training_axes]
        if not keys or any(key not in MUTABLE_KEYS for key in keys) or any(axis.kind == "grid" for axis in drawn):
            problems.append(f"scheduler: pbt changes {', '.join(MUTABLE_KEYS)} while training; sweep those, got {keys}")
        if settings.num_samples < 2 or settings.search != "random" or settings.num_seeds > 1:
            problems.append("scheduler: pbt needs num_samples of 2 or more, search=random and num_seeds=1")
        if base.scaling.max_workers > 1:
            problems.append("scheduler: pbt trains each trial with one worker")
    if settings.search == "optuna" and not sweep.training_axes:
        problems.append("search: optuna has nothing to search: no key that training reads is swept")
    return problems


def problems_of_trials(sweep: SweepConfig) -> list[str]:
    """The problems of all runs and evaluations; of trials that are only drawn later, those of the ends of the axes."""
    if sweep.is_searched:
        ends = [axis.values for axis in sweep.training_axes]
        keys = [axis.key for axis in sweep.training_axes]
        chosen = [dict(zip(keys, point, strict=True)) for point in itertools.product(*ends)]
    else:
        chosen = list(sweep.trials().values())
    problems = []
    for each in chosen:
        problems += _problems_of(sweep, each)
    return problems


def _problems_of(sweep: SweepConfig, chosen: Mapping[str, Any]) -> list[str]:
    try:
        config = configure(sweep.base, chosen)
        sweep.evaluations(config)
    except ConfigError as error:
        return [line.strip() for line in str(error).splitlines()[1:]]
    if config.data.needs_ray:
        return ["data.residency: trials share files, resident or streamed; got dataset, or a function in data.path"]
    return []

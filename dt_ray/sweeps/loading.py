"""Sweep files, names and overrides in, a `SweepConfig` out: every problem reported in one message."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from dt_ray.config.loading import (
    check_environment,
    decode_config,
    dotted_keys,
    find_config,
    read_overrides,
    read_yaml,
    start_from,
    with_values,
)
from dt_ray.config.schema import NEUTRAL_CONFIG, RunConfig
from dt_ray.errors import ConfigError
from dt_ray.runs.folder import default_name as run_name
from dt_ray.sweeps.config import Axis, SweepConfig, SweepSettings, value_of
from dt_ray.sweeps.conflicts import axis_problem, conflicts_of, problems_of_trials

Resolve = Callable[[Mapping[str, Any]], RunConfig]

DEFAULT_SWEEP, NEUTRAL_SWEEP = "target_return_context_length", "context_length"
KINDS = ("grid", "choice", "uniform", "log_uniform")


def load_sweep(
    sweep: str | None,
    config: str | None,
    overrides: Sequence[str],
    *,
    default_name: str | None = None,
    resolve: Resolve = decode_config,
) -> SweepConfig:
    """A sweep by the name or file of it and of the configuration that it starts from, with overrides.

    An override gives a plain value, which is then no longer swept, or `{grid: [...]}` and the like, which sweeps it.
    Without names both are Pendulum's, or the neutral ones where the overrides name a log or an environment. `resolve`
    makes a configuration of plain values of which some say `auto`.

    Raises:
        ConfigError: all of the problems in one message, or a preset with another environment than its own.
    """
    changes, _ = read_overrides(overrides)
    start = config or start_from(changes)
    name = sweep or (NEUTRAL_SWEEP if start == NEUTRAL_CONFIG else DEFAULT_SWEEP)
    tree = read_yaml(find_config(name, "sweep"))
    within = tree.pop("config", None)
    values = within if within is not None and config is None else read_yaml(find_config(start))
    for preset, own in ((start, values), (name, tree)):
        if not Path(preset).is_file():
            check_environment(own, changes.get("env_id", tree.get("env_id")), preset=preset)
    called = default_name or run_name(name)
    return decode_sweep(tree, values, overrides, default_name=called, resolve=resolve)


def decode_sweep(
    tree: Mapping[str, Any],
    config: Mapping[str, Any],
    overrides: Sequence[str],
    *,
    default_name: str,
    resolve: Resolve = decode_config,
) -> SweepConfig:
    """A sweep from the plain values of its file and of the configuration that it starts from.

    Raises:
        ConfigError: all of the problems in one message.
    """
    changes, problems = read_overrides(overrides)
    given = {"storage_path": config.get("storage_path", "sweeps"), **_flat(tree), **_flat(changes)}
    names = {field.name for field in dataclasses.fields(SweepSettings)}
    settings = {key: value for key, value in given.items() if key in names}
    swept = {key: value for key, value in given.items() if key not in names and _is_axis(value)}
    base = resolve(with_values(config, {k: v for k, v in given.items() if k not in names and k not in swept}))
    if base.env_id is None:
        settings = {"metric": "action_error", **settings}
    decoded = SweepSettings()
    try:
        decoded = TypeAdapter(SweepSettings).validate_python(settings)
    except ValidationError as error:
        problems += [f"{each['loc'][0]}: {each['msg']}, got {each['input']!r}" for each in error.errors()]
    axes = []
    for key, value in swept.items():
        ((kind, choices),) = value.items()
        if kind in ("uniform", "log_uniform") and isinstance(choices, list):
            choices = [_as_number(each) for each in choices]
        problem = axis_problem(key, kind, choices)
        if problem:
            problems.append(problem)
            continue
        if key == "evaluation.target_returns":  # one target, or several at once
            choices = [each if isinstance(each, list) else [each] for each in choices]
        present = value_of(base, key)
        is_integer = isinstance(present, int) and not isinstance(present, bool)
        axes.append(Axis(key=key, kind=kind, values=tuple(choices), is_integer=is_integer))
    base = replace(base, name=base.name or default_name)
    sweep = SweepConfig(base=base, axes=tuple(axes), settings=decoded)
    problems = problems or conflicts_of(sweep) or problems_of_trials(sweep)
    if problems:
        lines = "\n".join(f"  {line}" for line in dict.fromkeys(problems))
        raise ConfigError(f"{len(problems)} problem(s) in the sweep:\n{lines}")
    return sweep


def _flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a tree by their dotted keys, sections written out or not."""
    known, values = set(dotted_keys(RunConfig)), {}
    for key, value in tree.items():
        parts = value if isinstance(value, Mapping) and not _is_axis(value) else {}
        if any(f"{key}.{part}" in known for part in parts):
            values |= {f"{key}.{part}": each for part, each in parts.items()}
        else:
            values[key] = value
    return values


def _as_number(value: Any) -> Any:
    """YAML reads 1e-4 as text."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _is_axis(value: Any) -> bool:
    return isinstance(value, Mapping) and len(value) == 1 and next(iter(value)) in KINDS

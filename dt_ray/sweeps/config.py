"""Sweeps: which settings vary, how, and the runs and evaluations that come of it.

A sweep file maps dotted keys of the configuration to `{grid: [...]}`, `{choice: [...]}`, `{uniform: [low, high]}` or
`{log_uniform: [low, high]}`, others to plain values; beside them are the fields of `SweepSettings`. What only an
evaluation reads multiplies evaluations, never training runs.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import yaml
from annotated_types import Ge
from pydantic import TypeAdapter, ValidationError

from dt_ray.config.loading import (
    check_environment,
    decode_config,
    dotted_keys,
    find_config,
    read_overrides,
    read_yaml,
    start_from,
    to_plain,
    with_values,
)
from dt_ray.config.schema import NEUTRAL_CONFIG, EvaluationConfig, RunConfig
from dt_ray.errors import ConfigError
from dt_ray.runs.folder import default_name as run_name

Resolve = Callable[[Mapping[str, Any]], RunConfig]

DEFAULT_SWEEP, NEUTRAL_SWEEP = "target_return_context_length", "context_length"
KINDS = ("grid", "choice", "uniform", "log_uniform")
EVALUATION_KEYS = tuple(
    f"evaluation.{key}" for key in ("target_returns", "num_episodes", "seed", "max_timesteps", "context_length")
)
# What a population may change in the middle of a training.
MUTABLE_KEYS = ("optim.learning_rate", "optim.gradient_clip", "data.return_noise")


@dataclass(frozen=True, kw_only=True)
class SweepSettings:
    num_samples: Annotated[int, Ge(1)] = 1  # draws of what isn't a grid, for each point of the grid
    num_seeds: Annotated[int, Ge(1)] = 1  # trainings of each setting, with seeds from `seed` on
    metric: Literal["return_mean", "normalized_score", "obedience_error", "action_error"] = "return_mean"
    # action_error: of held-out episodes, the one that there is without an environment
    mode: Literal["max", "min"] | None = None  # which of its values is best; null: the lowest error, the highest else
    scheduler: Literal["none", "asha", "median", "pbt"] = "none"  # what ends trials early, or changes them
    search: Literal["random", "optuna"] = "random"  # who draws
    max_concurrent: Annotated[int, Ge(1)] | None = None  # trials at a time; null: as many as there are CPUs for

    @property
    def direction(self) -> Literal["max", "min"]:
        return self.mode or ("min" if self.metric.endswith("_error") else "max")


@dataclass(frozen=True, kw_only=True)
class Axis:
    """A setting that varies, and over what."""

    key: str
    kind: Literal["grid", "choice", "uniform", "log_uniform"]
    values: tuple[Any, ...]  # [low, high] where it is continuous
    is_integer: bool = False

    @property
    def is_continuous(self) -> bool:
        return self.kind in ("uniform", "log_uniform")

    @property
    def is_evaluation(self) -> bool:
        """Whether only evaluations read it."""
        return self.key in EVALUATION_KEYS

    def draw(self, generator: np.random.Generator) -> Any:
        if not self.is_continuous:
            return self.values[generator.integers(len(self.values))]
        low, high = self.values
        if self.kind == "log_uniform":
            value = math.exp(generator.uniform(math.log(low), math.log(high)))
        else:
            value = float(generator.uniform(low, high))
        return round(value) if self.is_integer else value


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    base: RunConfig  # what every run has where nothing varies; its name and `storage_path` are the sweep's
    axes: tuple[Axis, ...]
    settings: SweepSettings

    @property
    def training_axes(self) -> list[Axis]:
        return [axis for axis in self.axes if not axis.is_evaluation]

    @property
    def seeds(self) -> range:
        return range(self.base.seed, self.base.seed + self.settings.num_seeds)

    @property
    def is_searched(self) -> bool:
        """Whether the trials are only known when those before them have ended."""
        return self.settings.search != "random" or self.settings.scheduler == "pbt"

    @property
    def num_trials(self) -> int:
        return self.settings.num_samples * self.settings.num_seeds if self.is_searched else len(self.trials())

    def trials(self) -> dict[str, dict[str, Any]]:
        """What each training run sets, by the run's name: grid x draws x seeds."""
        grid = [axis for axis in self.training_axes if axis.kind == "grid"]
        drawn = [axis for axis in self.training_axes if axis.kind != "grid"]
        points = list(itertools.product(*(axis.values for axis in grid)))
        settings = []
        for number, (_, point) in enumerate(itertools.product(range(self.settings.num_samples), points)):
            generator = np.random.default_rng([self.base.seed, number])
            chosen = {axis.key: value for axis, value in zip(grid, point, strict=True)}
            settings.append(chosen | {axis.key: axis.draw(generator) for axis in drawn})
        if self.settings.num_seeds > 1:
            settings = [each | {"seed": seed} for each in settings for seed in self.seeds]
        return {f"{number:05d}": each for number, each in enumerate(settings)}

    def evaluations(self, config: RunConfig) -> list[EvaluationConfig]:
        """The evaluations of a run: all its target returns in one, a further one for each other setting."""
        axes = [axis for axis in self.axes if axis.is_evaluation]
        evaluations: dict[tuple[Any, ...], EvaluationConfig] = {}
        for point in itertools.product(*(axis.values for axis in axes)):
            chosen = dict(zip((axis.key for axis in axes), point, strict=True))
            evaluation = configure(config, chosen).evaluation
            others = tuple(value for key, value in chosen.items() if key != "evaluation.target_returns")
            if (known := evaluations.get(others)) is not None:
                targets = (*known.target_returns, *evaluation.target_returns)
                evaluation = replace(known, target_returns=tuple(dict.fromkeys(targets)))
            evaluations[others] = evaluation
        return list(evaluations.values())

    def run_config(self, name: str, chosen: Mapping[str, Any], *, storage_path: str) -> RunConfig:
        """The configuration of one training run, evaluated as the first of its `evaluations`.

        Raises:
            ConfigError: the settings don't fit together.
        """
        config = configure(self.base, dict(chosen))
        return replace(config, name=name, storage_path=storage_path, evaluation=self.evaluations(config)[0])

    def to_yaml(self) -> str:
        """A sweep file that gives this sweep again."""
        axes = {axis.key: {axis.kind: list(axis.values)} for axis in self.axes}
        return yaml.safe_dump(
            {**axes, **dataclasses.asdict(self.settings), "config": to_plain(self.base)},
            sort_keys=False,
        )


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
        problem = _find_axis_fault(key, kind, choices, base)
        if problem:
            problems.append(problem)
            continue
        if key == "evaluation.target_returns":  # one target, or several at once
            choices = [each if isinstance(each, list) else [each] for each in choices]
        present = _value_at(to_plain(base), key)
        is_integer = isinstance(present, int) and not isinstance(present, bool)
        axes.append(Axis(key=key, kind=kind, values=tuple(choices), is_integer=is_integer))
    base = replace(base, name=base.name or default_name)
    sweep = SweepConfig(base=base, axes=tuple(axes), settings=decoded)
    problems = problems or _find_conflicts(sweep) or _find_faulty_trials(sweep)
    if problems:
        lines = "\n".join(f"  {line}" for line in dict.fromkeys(problems))
        raise ConfigError(f"{len(problems)} problem(s) in the sweep:\n{lines}")
    return sweep


def configure(config: RunConfig, chosen: Mapping[str, Any]) -> RunConfig:
    """The configuration with these dotted keys set.

    Raises:
        ConfigError: all of the problems in one message.
    """
    return decode_config(with_values(to_plain(config), chosen))


def value_of(config: RunConfig, key: str) -> Any:
    """What a configuration has under a dotted key, as a plain value."""
    return _value_at(to_plain(config), key)


def _value_at(tree: Mapping[str, Any], key: str) -> Any:
    node: Any = tree
    for part in key.split("."):
        node = node[part]
    return node


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


def _find_axis_fault(key: str, kind: str, choices: Any, base: RunConfig) -> str | None:
    known = dotted_keys(RunConfig)
    if key not in known:
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


def _find_conflicts(sweep: SweepConfig) -> list[str]:
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
    if (settings.metric == "action_error") != (base.env_id is None):
        allowed = "action_error, of held-out episodes" if base.env_id is None else "of returns reached in it"
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


def _find_faulty_trials(sweep: SweepConfig) -> list[str]:
    """What is wrong with any of the runs and evaluations, or with the ends of what is drawn later."""
    if sweep.is_searched:
        ends = [axis.values for axis in sweep.training_axes]
        keys = [axis.key for axis in sweep.training_axes]
        chosen = [dict(zip(keys, point, strict=True)) for point in itertools.product(*ends)]
    else:
        chosen = list(sweep.trials().values())
    problems = []
    for each in chosen:
        problems += _find_faults(sweep, each)
    return problems


def _find_faults(sweep: SweepConfig, chosen: Mapping[str, Any]) -> list[str]:
    try:
        sweep.evaluations(configure(sweep.base, chosen))
    except ConfigError as error:
        return [line.strip() for line in str(error).splitlines()[1:]]
    return []

"""Sweeps: which settings vary, how, and the runs and evaluations that come of it.

A sweep file maps dotted keys of the configuration to `{grid: [...]}`, `{choice: [...]}`, `{uniform: [low, high]}` or
`{log_uniform: [low, high]}`, others to plain values; beside them are the fields of `SweepSettings`. What only an
evaluation reads multiplies evaluations, never training runs.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import numpy as np
import yaml
from annotated_types import Ge

from dt_ray.config.loading import decode_config, to_plain, with_values
from dt_ray.config.schema import EvaluationConfig, RunConfig

EVALUATION_KEYS = tuple(
    f"evaluation.{key}" for key in ("target_returns", "num_episodes", "seed", "max_timesteps", "context_length")
)


Metric = Literal["return_mean", "normalized_score", "obedience_error", "action_error", "offline_estimate"]
ESTIMATE: Metric = "offline_estimate"  # computed when all trials have ended


@dataclass(frozen=True, kw_only=True)
class SweepSettings:
    num_samples: Annotated[int, Ge(1)] = 1  # draws of what isn't a grid, for each point of the grid
    num_seeds: Annotated[int, Ge(1)] = 1  # trainings of each setting, with seeds from `seed` on
    metric: Metric = "return_mean"
    # action_error: of held-out episodes; offline_estimate: of the return, from the log alone; both need no environment
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


def configure(config: RunConfig, chosen: Mapping[str, Any]) -> RunConfig:
    """The configuration with these dotted keys set.

    Raises:
        ConfigError: all of the problems in one message.
    """
    return decode_config(with_values(to_plain(config), chosen))


def value_of(config: RunConfig, key: str) -> Any:
    """The value of a dotted key in a configuration, as a plain value."""
    node: Any = to_plain(config)
    for part in key.split("."):
        node = node.get(part) if key.startswith("algorithm_settings.") else node[part]
    return node

"""The learners by the name that `algorithm:` gives them."""

import importlib
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any, Literal

from dt_ray.config.schema import RunConfig
from dt_ray.data.normalizer import Normalizer
from dt_ray.data.spaces import SpaceSpec
from dt_ray.errors import ConfigError
from dt_ray.learners.base import Declaration, Learner, Policy
from dt_ray.learners.decision_transformer import BehaviorCloningLearner, DecisionTransformerLearner
from dt_ray.learners.iql import IQLLearner
from dt_ray.learners.world_model import WorldModelLearner
from dt_ray.models.state_values import StateValues

LEARNERS: dict[str, Callable[..., Learner]] = {
    "decision_transformer": DecisionTransformerLearner,
    "behavior_cloning": BehaviorCloningLearner,
    "iql": IQLLearner,
    "world_model": WorldModelLearner,
}

__all__ = [
    "LEARNERS",
    "Learner",
    "Policy",
    "check_settings",
    "declaration_of",
    "givers_of_values",
    "learner_class",
    "make_learner",
    "return_source_of",
    "window_length_of",
]  # fmt: skip


def learner_class(algorithm: str) -> Callable[..., Learner]:
    """One of `LEARNERS`, or the class meant by `module:Class`.

    Raises:
        ConfigError: there is none of this name.
    """
    if algorithm in LEARNERS:
        return LEARNERS[algorithm]
    module, colon, name = algorithm.partition(":")
    if not colon:
        raise ConfigError(f"algorithm: one of {', '.join(LEARNERS)}, or module:Class, got {algorithm!r}")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"algorithm: can't load {algorithm!r}: {error}") from None


def declaration_of(config: RunConfig) -> Declaration:
    """The declaration of the configured learner.

    Raises:
        ConfigError: there is none of this name.
    """
    return _declared(learner_class(config.algorithm))


def window_length_of(config: RunConfig) -> int:
    """Steps of a training window of the configured learner."""
    return declaration_of(config).window_length or config.window_length


def return_source_of(config: RunConfig) -> Literal["column", "rewards"] | None:
    """Where returns-to-go come from: the logged column, the rewards, or None for the column if there is one."""
    source = config.data.return_source
    return "rewards" if declaration_of(config).returns == "rewards" else None if source == "value" else source


def _declared(learner: Callable[..., Learner]) -> Declaration:
    return getattr(learner, "declares", Declaration())


def givers_of_values() -> str:
    """The names of the packaged learners of values, in words."""
    return " or ".join(name for name, learner in LEARNERS.items() if _declared(learner).gives_values)


def check_settings(config: RunConfig, *, every_section: bool = True) -> None:
    """Raises:
    ConfigError: there is no such learner, or settings don't go with it; with `every_section` also those of sections
        that other learners read and this one does not.
    """
    declared = declaration_of(config)
    problems = list(declared.conflicts_in(config))
    others = {section for learner in LEARNERS.values() for section in _declared(learner).sections}
    for section in sorted(others - set(declared.sections)) if every_section else ():
        given, usual = getattr(config, section), getattr(RunConfig(), section)
        changed = [each.name for each in fields(given) if getattr(given, each.name) != getattr(usual, each.name)]
        problems += [f"{section}.{name}: {config.algorithm} does not read it; leave it out" for name in changed]
    if problems:
        lines = [f"{len(problems)} problem(s) in the configuration:", *problems]
        raise ConfigError("\n  ".join(lines))


def make_learner(
    config: RunConfig, spec: SpaceSpec, normalizer: Normalizer, values: StateValues | None, **placement: Any
) -> tuple[Learner, RunConfig]:
    """A new learner, with the values that its data was relabelled with, and the configuration that describes it.

    Raises:
        ConfigError: the model has values, and the data none.
    """
    if values is None and config.model.values is not None:
        raise ConfigError("model.values: what data.return_source=value puts into the model, not to be set")
    if values is not None:
        config = replace(config, model=replace(config.model, values=values.config))
    learner = learner_class(config.algorithm)(config, spec, normalizer, **placement)
    if values is not None:
        learner.model.values.load_state_dict(values.state_dict())  # as `counts_from_values` promises
    return learner, config

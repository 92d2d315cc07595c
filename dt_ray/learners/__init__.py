"""The learners by the name that `algorithm:` gives them."""

import importlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from dt_ray.config.schema import RunConfig
from dt_ray.data.normalizer import Normalizer
from dt_ray.data.spaces import SpaceSpec
from dt_ray.errors import ConfigError
from dt_ray.learners.base import Learner, Policy
from dt_ray.learners.decision_transformer import DecisionTransformerLearner
from dt_ray.learners.iql import IQLLearner
from dt_ray.models.state_values import StateValues

LEARNERS: dict[str, Callable[..., Learner]] = {
    "decision_transformer": DecisionTransformerLearner,
    "behavior_cloning": partial(DecisionTransformerLearner, is_conditioned=False),
    "iql": IQLLearner,
}

__all__ = ["LEARNERS", "Learner", "Policy", "find_learner", "make_learner"]


def find_learner(algorithm: str) -> Callable[..., Learner]:
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
    learner = find_learner(config.algorithm)(config, spec, normalizer, **placement)
    if values is not None:
        learner.model.values.load_state_dict(values.state_dict())
    return learner, config

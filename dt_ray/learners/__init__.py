"""The learners by the name that `algorithm:` gives them."""

import importlib
from collections.abc import Callable
from functools import partial

from dt_ray.errors import ConfigError
from dt_ray.learners.base import Learner, Policy
from dt_ray.learners.decision_transformer import DecisionTransformerLearner
from dt_ray.learners.iql import IQLLearner

LEARNERS: dict[str, Callable[..., Learner]] = {
    "decision_transformer": DecisionTransformerLearner,
    "behavior_cloning": partial(DecisionTransformerLearner, is_conditioned=False),
    "iql": IQLLearner,
}

__all__ = ["LEARNERS", "Learner", "Policy", "find_learner"]


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

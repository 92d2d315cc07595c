"""The learners by the name that `algorithm:` gives them."""

from collections.abc import Callable

from dt_ray.learners.base import Learner, Policy
from dt_ray.learners.decision_transformer import DecisionTransformerLearner

LEARNERS: dict[str, Callable[..., Learner]] = {"decision_transformer": DecisionTransformerLearner}

__all__ = ["LEARNERS", "Learner", "Policy"]

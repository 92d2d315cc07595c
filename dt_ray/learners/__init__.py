"""The learners by the name that `algorithm:` gives them."""

from collections.abc import Callable
from functools import partial

from dt_ray.learners.base import Learner, Policy
from dt_ray.learners.decision_transformer import DecisionTransformerLearner
from dt_ray.learners.iql import IQLLearner

LEARNERS: dict[str, Callable[..., Learner]] = {
    "decision_transformer": DecisionTransformerLearner,
    "behavior_cloning": partial(DecisionTransformerLearner, is_conditioned=False),
    "iql": IQLLearner,
}

__all__ = ["LEARNERS", "Learner", "Policy"]

"""The algorithms by their names: `from dt_ray.algorithms import DecisionTransformer, BehaviorCloning, IQL`."""

from dt_ray.api import IQL, BehaviorCloning, DecisionTransformer

__all__ = ["IQL", "BehaviorCloning", "DecisionTransformer"]

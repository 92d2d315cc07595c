"""Return-conditioned policies from logged trajectories, on Ray: from one laptop command to a cluster."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dt_ray.api import IQL, BehaviorCloning, DecisionTransformer, train_decision_transformer

__all__ = ["IQL", "BehaviorCloning", "DecisionTransformer", "train_decision_transformer"]


def __getattr__(name: str) -> Any:
    """Imports torch only when something that needs it is asked for."""
    if name == "__version__":
        from importlib.metadata import version

        return version("dt-ray")
    if name in __all__:
        from dt_ray import api

        return getattr(api, name)
    raise AttributeError(f"module 'dt_ray' has no attribute {name!r}")

"""Models: tensors in, tensors out. Importable without Ray."""

from dt_ray.models.batch import WindowBatch
from dt_ray.models.decision_transformer import DecisionTransformerModel, last_step

__all__ = ["DecisionTransformerModel", "WindowBatch", "last_step"]

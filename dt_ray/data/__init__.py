"""Offline data: episodes, returns-to-go and windows. NumPy and Arrow only."""

from dt_ray.data.logs.datasets import read_dataset
from dt_ray.data.normalizer import Normalizer
from dt_ray.data.returns import returns_to_go
from dt_ray.data.transitions import TransitionDataset
from dt_ray.data.windows import Windows, slice_windows

__all__ = ["Normalizer", "TransitionDataset", "Windows", "read_dataset", "returns_to_go", "slice_windows"]

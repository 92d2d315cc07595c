"""Episode ids that are unique within a file, and within all files of a dataset.

Legend: E episodes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int
from numpy import ndarray

from dt_ray.config.schema import DataConfig
from dt_ray.data.logs.files import DatasetFile

# Where ids of several files are the same, the upper bits of an episode's id are the number of its file.
FILE_BITS = 32  # the bits below them


def unique_ids(ids: Int[ndarray, "E"]) -> Int[ndarray, "E"]:
    """The ids, or, where one is there twice, numbers."""
    return ids if len(np.unique(ids)) == len(ids) else np.arange(len(ids))


def numbers_in_file(labels: Sequence[int | str] | ndarray, file_index: int) -> Int[ndarray, "E"]:
    """Ids that no other file has: the logged ones where they are small and different, else numbers in their order."""
    ids = np.asarray(labels) if all(isinstance(each, (int, np.integer)) for each in labels) else np.zeros(2)
    small = ids.dtype.kind in "iu" and ids.min(initial=0) >= 0 and ids.max(initial=0) < 2**FILE_BITS
    within = unique_ids(ids) if small else np.arange(len(labels))
    return within.astype(np.int64) + (file_index << FILE_BITS)


def own_ids(ids: Int[ndarray, "E"], file: DatasetFile, config: DataConfig) -> Int[ndarray, "E"]:
    """An id of its own for each episode of a file, by the logged ones."""
    if config.episode_per_file:
        return np.array([file.index])
    return numbers_in_file(ids, file.index) if file.is_numbered else unique_ids(ids)

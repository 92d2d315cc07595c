"""All episodes of a dataset, read in this process."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from dt_ray.config.schema import DataConfig
from dt_ray.data.blocks import EpisodeBlocks
from dt_ray.data.logs.reading import read_blocks
from dt_ray.data.logs.sources import sound_files_here
from dt_ray.data.spaces import SpaceSpec
from dt_ray.data.transitions import TransitionDataset


def read_dataset(config: DataConfig, spec: SpaceSpec | None = None) -> TransitionDataset:
    """All episodes of a dataset's sound files.

    Raises:
        DataError: a file can't be trained on, files differ in kind, or an episode's fragments contradict one another.
    """
    parts = list(read_parts(config, spec))
    blocks = EpisodeBlocks(parts)
    return parts[0] if len(parts) == 1 else blocks.take(np.arange(blocks.num_episodes))


def read_parts(config: DataConfig, spec: SpaceSpec | None = None) -> Iterator[TransitionDataset]:
    """The same, file by file; all at once where episodes lie in several files.

    Raises:
        DataError: as `read_dataset`.
    """
    return read_blocks(config, spec, sound_files_here(config, spec)[0])

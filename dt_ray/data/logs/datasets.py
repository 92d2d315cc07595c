"""All episodes of a dataset, read in this process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from dt_ray.config.schema import DataConfig
from dt_ray.data.blocks import EpisodeBlocks
from dt_ray.data.logs.checks import faults_in
from dt_ray.data.logs.files import DatasetFile
from dt_ray.data.logs.reading import read_blocks, with_clipped_actions
from dt_ray.data.logs.sources import sound_files_here
from dt_ray.data.spaces import SpaceSpec
from dt_ray.data.transitions import STEP_FIELDS, TransitionDataset

MAX_KEPT_BYTES = 2**28  # of episodes that are kept from one reading for the next


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


@dataclass
class ReadEpisodes:
    """Episodes that were read once and are kept for one run that trains on them, up to `MAX_KEPT_BYTES`."""

    sound_files: tuple[Sequence[DatasetFile], int] = ((), 0)  # and how many `data.on_corrupt=skip` left out
    parts: list[TransitionDataset] = field(default_factory=list[TransitionDataset])
    num_bytes: int = 0
    is_whole: bool = False  # all episodes of the files are here

    def read(self, config: DataConfig) -> Iterator[TransitionDataset]:
        """The episodes of a dataset, file by file as `read_parts` gives them, which are kept meanwhile.

        Raises:
            DataError: as `read_dataset`.
        """
        self.sound_files = sound_files_here(config, None)
        for part in read_blocks(config, None, self.sound_files[0]):
            self.num_bytes += sum(getattr(part, name).nbytes for name in STEP_FIELDS)
            if self.num_bytes <= MAX_KEPT_BYTES:
                self.parts.append(part)
            yield part
        self.is_whole = self.num_bytes <= MAX_KEPT_BYTES
        if not self.is_whole:
            self.let_go()

    def suits(self, config: DataConfig, spec: SpaceSpec) -> bool:
        """Whether the files, read again for these spaces, would give these episodes and no fault; else lets them go."""
        if self.is_whole:
            self.parts = [with_clipped_actions(part, config, spec) for part in self.parts]
            self.is_whole = not any(True for part in self.parts for _ in faults_in(part, spec))
            if not self.is_whole:
                self.let_go()
        return self.is_whole

    def take(self) -> Iterator[TransitionDataset]:
        """The episodes, part by part, for the last time: none is kept after it was given."""
        self.is_whole = False
        while self.parts:
            yield self.parts.pop(0)

    def let_go(self) -> None:
        """Keeps none of the episodes."""
        self.is_whole = False
        self.parts.clear()

"""What a run makes of a dataset before it lays it out."""

from __future__ import annotations

from dt_ray.config.schema import RunConfig
from dt_ray.data import Normalizer, TransitionDataset
from dt_ray.data.blocks import EpisodeBlocks
from dt_ray.data.spaces import SpaceSpec
from dt_ray.training.layout import plan_layout


def split_and_fit(
    data: TransitionDataset, spec: SpaceSpec, config: RunConfig
) -> tuple[TransitionDataset, TransitionDataset, Normalizer]:
    """The training and the held-out episodes, and the units fitted on the training episodes."""
    layout, blocks = plan_layout(EpisodeBlocks([data]), spec, config)
    return blocks.take(layout.train), blocks.take(layout.validation), layout.normalizer

"""What a streaming run trains on."""

from __future__ import annotations

from dataclasses import replace

from dt_ray.config.loading import load_config
from dt_ray.config.schema import DataConfig, RunConfig
from dt_ray.data import TransitionDataset
from dt_ray.data.logs.sources import sound_files_here
from dt_ray.data.spaces import SpaceSpec
from dt_ray.training.file_facts import FileFacts
from dt_ray.training.stream_facts import StreamingData
from dt_ray.training.streaming import StreamingSource


def streamed(config: DataConfig, data: TransitionDataset) -> tuple[TransitionDataset, ...]:
    """The episodes that a streaming run trains on, in the units of the data."""
    num, dims = data.num_transitions, (data.observations.shape[1], data.actions.shape[1])
    spec = SpaceSpec(
        observation_dim=dims[0], action_dim=dims[1], action_low=(-2.0,) * dims[1], action_high=(2.0,) * dims[1]
    )
    run = run_config(replace(config, residency="streaming"))
    files, _ = sound_files_here(run.data, spec)
    built = StreamingData.build(files, FileFacts(run, spec))
    assert built.num_transitions == num
    source = StreamingSource(built, run)
    return tuple(source._read(list(source._plan_pass(0))))


def run_config(config: DataConfig) -> RunConfig:
    base = load_config("decision_transformer/pendulum", ["model.max_timesteps=1000", "scaling.num_workers=0"])
    data = replace(config, validation_fraction=0.0, memory_mb=64, return_scale=1.0)
    return replace(base, data=data)

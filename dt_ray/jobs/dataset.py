"""Collects the dataset that a configuration asks for."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

import pyarrow as pa
from pyarrow import fs

from dt_ray.config.schema import RunConfig
from dt_ray.data.logs.files import resolve
from dt_ray.data.spaces import SpaceSpec
from dt_ray.errors import DataError
from dt_ray.play.collection import CollectionPlan, write_dataset

log = logging.getLogger("dt_ray")


def needs_dataset(config: RunConfig) -> bool:
    """Whether the dataset is not there and the configuration says how to make it."""
    if config.data.mix or config.data.collect is None or not config.data.path or config.data.is_function:
        return False
    filesystem, path = resolve(config.data.path)
    return filesystem.get_file_info(path).type == fs.FileType.NotFound


def make_dataset(
    config: RunConfig, collect: Callable[[CollectionPlan], Iterable[pa.Table]], *, spec: SpaceSpec | None = None
) -> None:
    """Collects the dataset that `data.collect` describes into `data.path`; `spec` may have other action bounds."""
    settings = config.data.collect
    assert settings is not None
    assert config.env_id is not None, "data.collect is refused without an environment"
    plan = CollectionPlan(
        env_id=config.env_id,
        behavior=settings.behavior,
        num_episodes=settings.num_episodes,
        seed=settings.seed,
        max_timesteps=config.evaluation.max_timesteps,
        env_kwargs=config.env_kwargs,
        max_envs=config.evaluation.max_envs,
        spec=spec,
    )
    plan.check()
    log.info("collecting %d %s episodes of %s", plan.num_episodes, plan.behavior, plan.env_id)
    try:
        write_dataset(config.data.path, collect(plan), source=plan.source)
    except DataError:
        if needs_dataset(config):
            raise
        log.info("another process has written %s meanwhile", config.data.path)
    else:
        log.info("wrote %s", config.data.path)

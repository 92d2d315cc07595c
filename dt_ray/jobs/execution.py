"""Executes a training whose settings were checked, in this process or on a cluster."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from threading import Thread
from typing import TypeVar

from dt_ray.config.schema import RunConfig
from dt_ray.data.logs.datasets import ReadEpisodes
from dt_ray.data.spaces import SpaceSpec
from dt_ray.environments.batched import try_environment
from dt_ray.errors import ResourceError
from dt_ray.jobs.dataset import make_dataset, needs_dataset
from dt_ray.play.collection import collect_here
from dt_ray.runs.folder import RunFolder
from dt_ray.runs.storage import Folder
from dt_ray.training.context import LocalContext
from dt_ray.training.interrupts import stops_asked_of
from dt_ray.training.loop import check_checkpoint, run_training
from dt_ray.training.preparing import make_source, prepare_here
from dt_ray.training.recorder import TrainResult

Plan = TypeVar("Plan")

log = logging.getLogger("dt_ray")


def train(
    config: RunConfig,
    spec: SpaceSpec,
    prepare_folder: Callable[[], None],
    *,
    checkpoint: Folder | None = None,
    read: ReadEpisodes | None = None,
    verbose: bool,
    dashboard: bool,
) -> TrainResult:
    """Trains a checked configuration where its `scaling` says; calls `prepare_folder` when the data is found sound.

    Data that was `read` already is not read again where it suits.

    Raises:
        UserError: anything that the user can mend.
    """
    if config.scaling.num_workers == 0:
        return _train_here(config, spec, prepare_folder, checkpoint=checkpoint, read=read)

    # Ray takes seconds to import, and only runs that use it need it.
    from dt_ray.distributed.cluster import plan_on_cluster

    with prepared_cluster(config, spec, lambda: plan_on_cluster(config), verbose=verbose, dashboard=dashboard) as plan:
        for note in plan.notes:
            log.warning(note)
        # Ray Train takes another second or two to import, which the data needs too.
        Thread(target=import_module, args=("dt_ray.distributed.training",)).start()
        from dt_ray.distributed.preparing import check_checkpoint_on_ray, prepare_data

        data = prepare_data(config, spec, read)
        if checkpoint is not None:
            check_checkpoint_on_ray(checkpoint, config, data)
        prepare_folder()
        log.info("training in %s", RunFolder.of(config))
        from dt_ray.distributed.training import train_on_ray

        return train_on_ray(config, data, plan, verbose=verbose)


@contextmanager
def prepared_cluster(
    config: RunConfig, spec: SpaceSpec, make_plan: Callable[[], Plan], *, verbose: bool, dashboard: bool
) -> Iterator[Plan]:
    """Joins or starts a cluster, makes a plan that it has room for, and checks environment, storage and data on it.

    Raises:
        UserError: it has no room, or a node can't reach the storage or the data.
    """
    from dt_ray.distributed.cluster import connection
    from dt_ray.distributed.collect import collect_on_ray
    from dt_ray.distributed.evaluation import try_environment_on_ray
    from dt_ray.distributed.paths import check_data, check_storage

    with connection(verbose=verbose, dashboard=dashboard):
        plan = make_plan()
        check_storage(config)
        try_environment_on_ray(config)
        if needs_dataset(config):
            make_dataset(config, collect_on_ray, spec=spec)
        check_data(config)
        yield plan


def _train_here(
    config: RunConfig,
    spec: SpaceSpec,
    prepare_folder: Callable[[], None],
    *,
    checkpoint: Folder | None,
    read: ReadEpisodes | None,
) -> TrainResult:
    import torch

    if config.scaling.use_gpu and not torch.cuda.is_available():
        raise ResourceError("scaling.use_gpu is set but torch sees no GPU; set scaling.use_gpu=false")
    if config.scaling.cpus_per_worker is not None:
        torch.set_num_threads(max(1, int(config.scaling.cpus_per_worker)))
    if config.env_id is not None:
        try_environment(config.env_id, config.env_kwargs, seed=config.evaluation.seed)
    if needs_dataset(config):
        make_dataset(config, collect_here, spec=spec)
    context = LocalContext(config, device="cuda" if config.scaling.use_gpu else "cpu")
    data = prepare_here(config, spec, read)
    for note in data.notes:
        log.warning("%s", note)
    source = make_source(data, config, device=context.device)
    if checkpoint is not None:
        check_checkpoint(checkpoint, config, source.spec, source.normalizer, source.values)
    prepare_folder()
    log.info("training in %s", RunFolder.of(config))
    with stops_asked_of(context.stop):
        return run_training(config, source, context)

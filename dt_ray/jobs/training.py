"""Starts and resumes runs: checks everything before anything is written, then trains here or on Ray."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import replace
from typing import Any

from pyarrow import fs

from dt_ray.config.loading import decode_config, load_config, to_plain
from dt_ray.config.modules import allow_modules, allow_overrides, check_names
from dt_ray.config.schema import BATCH_SETTINGS, DataConfig, RunConfig
from dt_ray.data.held_out import HeldOutEpisodes
from dt_ray.data.logs.datasets import ReadEpisodes
from dt_ray.data.logs.files import absolute, resolve
from dt_ray.data.logs.looks import read_log_spaces
from dt_ray.data.spaces import SpaceSpec, choose_bounds, read_spaces
from dt_ray.errors import ConfigError, RunError
from dt_ray.jobs.dataset import needs_dataset
from dt_ray.jobs.execution import train
from dt_ray.learners import check_settings, declaration_of, givers_of_values
from dt_ray.runs.folder import RunFolder, default_name, with_values_checkpoint
from dt_ray.runs.lease import Lease
from dt_ray.runs.storage import Folder
from dt_ray.training.preparing import read_held_out_here
from dt_ray.training.recorder import TrainResult
from dt_ray.training.trackers import check_trackers

log = logging.getLogger("dt_ray")

Watch = Callable[[RunConfig], AbstractContextManager[Any]]  # shows a run while it takes place


def name_run(config: RunConfig, config_name: str) -> RunConfig:
    """The configuration with a name, and with absolute paths, since workers have other working directories."""
    return replace(
        config,
        name=config.name or default_name(config_name),
        storage_path=str(Folder.at(config.storage_path)),
        data=with_absolute_paths(config.data),
    )


def with_absolute_paths(data: DataConfig) -> DataConfig:
    """The same settings with absolute paths."""
    return replace(
        data,
        path=absolute(data.path) if data.path else "",
        values=_absolute_run(data.values),
        mix={absolute(path): share for path, share in data.mix.items()},
    )


def start_run(
    config: RunConfig,
    *,
    overwrite: bool = False,
    read: ReadEpisodes | None = None,
    verbose: bool = False,
    dashboard: bool = False,
    watch: Watch = nullcontext,
) -> TrainResult:
    """Trains a new run; its folder appears when its data has been read and found sound.

    Data that was `read` to derive the settings is not read again where it fits.
    If `data.values` is a configuration, a run `NAME-values` of it is trained first.

    Raises:
        UserError: anything that the user can mend, named before training starts where it can be known.
    """
    run = RunFolder.of(config)
    allow_modules(*config.named_code.values())
    if overwrite:
        run.check_writable()
    else:
        run.check_free()
    needed = config.relabels or config.data.is_function
    with one_connection(config, needed=needed, verbose=verbose, dashboard=dashboard):
        spec = check_run(config)
        if config.relabels:
            values = _learn_values(config, overwrite=overwrite, verbose=verbose, watch=watch)
            config = with_values_checkpoint(replace(config, data=replace(config.data, values=values)))

        def prepare_folder() -> None:
            if overwrite:
                run.check_writable()
            else:
                run.check_free()  # before the lease makes the folder
            lease.acquire()
            run.create(config, overwrite=overwrite)

        with closing(Lease(run.folder)) as lease, watch(config):
            return train(config, spec, prepare_folder, read=read, verbose=verbose, dashboard=dashboard)


def one_connection(
    config: RunConfig, *, needed: bool, verbose: bool = False, dashboard: bool = False
) -> AbstractContextManager[Any]:
    """One connection to Ray for two runs after one another, where two are `needed`."""
    if not needed or config.scaling.num_workers == 0:
        return nullcontext()
    from dt_ray.distributed.cluster import connection

    return connection(verbose=verbose, dashboard=dashboard)


def _learn_values(config: RunConfig, *, overwrite: bool, verbose: bool, watch: Watch) -> str:
    """The run that `data.values` means; for a configuration, that run is trained or resumed first."""
    assert config.data.values is not None
    if Folder.at(config.data.values).kind() == fs.FileType.Directory:
        return config.data.values
    first = values_config(config)
    run = RunFolder.of(first)
    if overwrite or not run.folder.exists():
        log.info("learning values first, by %s", config.data.values)
        start_run(first, overwrite=overwrite, verbose=verbose, watch=watch)
    elif run.read_config() != first:
        raise RunError(f"{run} exists already, with other settings; choose another name=… or replace it: --overwrite")
    else:
        with watch(first):
            resume_run(first, verbose=verbose)
    return str(run)


def values_config(config: RunConfig) -> RunConfig:
    """The configuration of the run on the same data that learns the values for `config`.

    Raises:
        ConfigError: there is no such configuration, it is of another algorithm, or it does not fit the run's data.
    """
    assert config.data.values is not None
    learns = load_config(config.data.values)
    if not declaration_of(learns).gives_values:
        kinds = givers_of_values()
        raise ConfigError(
            f"data.values: a configuration of {kinds}, got one of {learns.algorithm}: {config.data.values}"
        )
    unlike = {"return_source": None, "values": None, "return_scale": None, "window_length": None, **BATCH_SETTINGS}
    evaluation = replace(
        config.evaluation,
        every=learns.evaluation.every,
        target_returns=config.evaluation.target_returns[:1],
        context_length=None,
    )
    first = replace(
        learns,
        name=f"{config.name}-values",
        data=replace(config.data, **unlike),
        model=replace(learns.model, max_timesteps=config.model.max_timesteps),
        evaluation=evaluation,
        **{
            name: getattr(config, name)
            for name in ("env_id", "env_kwargs", "seed", "storage_path", "scaling", "logging")
        },
    )
    return decode_config(to_plain(first))


def resumed_config(path: str, overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration with which a run is resumed; overrides that repeat its `module:name` allow that module.

    Raises:
        RunError: no such run, or its configuration names a module that the user did not.
        ConfigError: an override is wrong, or changes what a checkpoint fixes.
    """
    run = RunFolder(Folder.at(path))
    before = run.read_config()
    allow_overrides(overrides)
    check_names(before.named_code, source=f"{run}/config.yaml")
    place = {"name": run.folder.name, "storage_path": run.folder.parent.uri}  # it may have been moved
    before = replace(before, **place, data=with_absolute_paths(before.data))
    config = decode_config(to_plain(before), overrides)
    config = replace(config, data=with_absolute_paths(config.data))
    fixed = [
        key
        for key in ("name", "storage_path", "algorithm", "env_id", "model", "seed")
        if getattr(config, key) != getattr(before, key)
    ]
    if fixed:
        raise ConfigError(f"a resumed run keeps its {', '.join(fixed)}; start a new run to change that")
    return config


def resume_run(config: RunConfig, *, verbose: bool = False, dashboard: bool = False) -> TrainResult:
    """Resumes a run from its newest complete checkpoint; `config` comes from `resumed_config`.

    Nothing of the run is changed before everything is checked.

    Raises:
        RunError: there is no complete checkpoint, it does not fit the data or the settings, or another process
            writes the run.
    """
    run = RunFolder.of(config)
    run.check_writable()
    checkpoint, faults = run.latest_checkpoint()
    for fault in faults:
        log.warning("skipped a checkpoint: %s", fault)
    if checkpoint is None:
        raise RunError(f"{run} has no complete checkpoint to resume from; start it again with --overwrite")
    check_inputs_are_there(config, str(run))
    log.info("resuming from %s", checkpoint)

    def prepare_folder() -> None:
        lease.acquire()
        run.write_config(config)

    needed = config.data.is_function
    with (
        one_connection(config, needed=needed, verbose=verbose, dashboard=dashboard),
        closing(Lease(run.folder)) as lease,
    ):
        spec = check_run(config, is_new=False)
        return train(config, spec, prepare_folder, checkpoint=checkpoint, verbose=verbose, dashboard=dashboard)


def check_inputs_are_there(config: RunConfig, resumed: str) -> None:
    """Raises:
    RunError: the data or the values that a run or sweep was trained with are no longer there.
    """
    missing = {} if needs_dataset(config) or config.data.is_function else {"data.path": config.data.paths}
    missing["data.values"] = (config.data.values,) if config.relabels and config.data.values else ()
    for key, paths in missing.items():
        for path in paths:
            filesystem, place = resolve(path)
            if filesystem.get_file_info(place).type == fs.FileType.NotFound:
                key = "data.mix" if key == "data.path" and config.data.mix else key
                raise RunError(
                    f"{resumed} was trained with {path}, which is not there; if it was moved, say where to: "
                    f"--resume {resumed} {key}=PLACE"
                )


def _absolute_run(place: str | None) -> str | None:
    """The absolute path of a run; a configuration's name stays as it is."""
    return place if place is None or Folder.at(place).kind() != fs.FileType.Directory else Folder.at(place).uri


def tell_how_to_resume(config: RunConfig) -> None:
    """Logs the command that resumes a stopped run, if it has a checkpoint."""
    run = RunFolder.of(config)
    if run.latest_checkpoint()[0] is not None:
        log.warning("stopped; resume with: python -m dt_ray.train --resume %s", run)


def check_run(config: RunConfig, *, is_new: bool = True) -> SpaceSpec:
    """Checks what can be checked without reading the data, and returns the spaces. Old runs may keep unused settings.

    Raises:
        ConfigError: an unknown algorithm, or settings that don't go with it.
        UnsupportedSpaceError: an environment that is out of scope, has no action bounds, or isn't there.
    """
    check_settings(config, every_section=is_new)
    check_trackers(config)
    if not config.data.paths:
        raise ConfigError("data.path: there is no log to train on; name one by data.path=LOG")
    spec = _log_spaces(config) if config.env_id is None else read_spaces(config.env_id, config.env_kwargs)
    return choose_bounds(spec, config.data.action_bounds, env_id=config.env_id)


def _log_spaces(config: RunConfig) -> SpaceSpec:
    if not config.data.is_function:
        return read_log_spaces(config.data)
    from dt_ray.distributed.functions import spaces_of_function

    with one_connection(config, needed=True):
        return spaces_of_function(config.data)


def read_held_out(config: RunConfig) -> HeldOutEpisodes:
    """The held-out episodes of a run without an environment, read again.

    Raises:
        ConfigError: no episode was held out.
    """
    with one_connection(config, needed=config.data.needs_ray):
        spec = check_run(config, is_new=False)
        if config.data.needs_ray:
            from dt_ray.distributed.preparing import prepare_data

            held_out = prepare_data(config, spec).fetch().held_out
        else:
            held_out = read_held_out_here(config, spec)
    if held_out is None:
        raise ConfigError(
            f"no episode of {', '.join(config.data.paths)} was held out (data.validation_fraction="
            f"{config.data.validation_fraction:g}): there is nothing to evaluate on"
        )
    return held_out

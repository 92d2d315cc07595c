"""Resolves settings that say `auto`, by reading the log and asking the environment."""

from __future__ import annotations

import json
import logging
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dt_ray.config.derived import (
    Derived,
    EnvironmentFacts,
    LogOutline,
    beyond_the_log,
    derive,
    undecided_keys,
    without_auto,
)
from dt_ray.config.loading import decode_config, with_values
from dt_ray.config.modules import allow_modules, check_names
from dt_ray.config.schema import RunConfig
from dt_ray.data.formats import is_flat
from dt_ray.data.logs.datasets import ReadEpisodes
from dt_ray.data.logs.files import DatasetFile, find_files
from dt_ray.data.logs.outline import make_outline, outline_rows
from dt_ray.data.logs.sizes import decoded_size
from dt_ray.environments.batched import read_environment
from dt_ray.errors import ConfigError, UnsupportedSpaceError
from dt_ray.jobs.dataset import needs_dataset
from dt_ray.learners import declaration_of, return_source_of
from dt_ray.training.file_facts import FileFacts
from dt_ray.training.preparing import residency_by_size

log = logging.getLogger("dt_ray")

LARGE = 2**29  # bytes; larger logs are read by Ray's tasks, where the run uses Ray


@dataclass(frozen=True, kw_only=True)
class ResolvedSettings:
    """A configuration without `auto`, what was derived for it, and the log where it was read for that."""

    config: RunConfig
    derived: tuple[Derived, ...] = ()
    read: ReadEpisodes | None = None  # for a run of `config`


def resolve_settings(tree: Mapping[str, Any], *, verbose: bool = False) -> ResolvedSettings:
    """The configuration of plain values, of which those that say `auto` are derived from the log and the environment.

    Raises:
        ConfigError: what is wrong with the settings, all of it in one message, before the log is looked at.
        UserError: the log can't be read, or the environment not be made.
    """
    keys = undecided_keys(tree)
    if not keys:
        return ResolvedSettings(config=decode_config(tree))
    draft = _draft(tree, keys)
    if not draft.data.paths:
        raise ConfigError(
            "data.path: there is no log to train on; name one by data.path=LOG, or make one: python -m dt_ray.data "
            f"collect --env {draft.env_id or 'ID'} --out DIR"
        )
    if needs_dataset(draft):
        raise ConfigError(
            f"data.collect: settings are derived from the log, and there is none at {draft.data.path} yet; collect it, "
            f"then type the same again: {_collect_command(draft, keys)}"
        )
    allow_modules(*draft.named_code.values())
    outline, read = _look_at_log(draft, verbose=verbose)
    values: dict[str, Any] = {}
    derived: list[Derived] = []
    env_id, env_kwargs = draft.env_id, tree.get("env_kwargs") or {}
    if "env_id" in keys:
        env_id, env_kwargs = outline.env_id, env_kwargs or dict(outline.env_kwargs)
        why = (
            "the log says so" if env_id else "the log names none: held-out episodes are evaluated; env_id=ID names one"
        )
        derived.append(Derived(key="env_id", value=env_id, why=why))
        values["env_kwargs"] = env_kwargs
    environment = _environment(env_id, env_kwargs, outline, is_derived="env_id" in keys)
    sizes = declaration_of(draft).sizes
    derived += derive(keys, outline, environment, given=draft, sizes=sizes(outline) if sizes is not None else ())
    values |= {each.key: each.value for each in derived}
    config = decode_config(with_values(without_auto(tree)[0], values))
    if "evaluation.target_returns" not in keys and (note := beyond_the_log(config.evaluation.target_returns, outline)):
        derived.append(note)
    return ResolvedSettings(config=config, derived=tuple(derived), read=read)


def name_of_log(config: RunConfig) -> str:
    """The name of a log, for runs without a name of their own."""
    return Path(config.data.paths[0].removeprefix("minari:").rstrip("/")).stem


def _draft(tree: Mapping[str, Any], keys: list[str]) -> RunConfig:
    """The configuration with harmless values for the settings that are not derived yet.

    Raises:
        ConfigError: what is wrong with the rest.
    """
    stand_ins: dict[str, Any] = {}
    if "env_id" in keys:
        stand_ins["env_kwargs"] = {}
    if "evaluation.target_returns" in keys:
        stand_ins["evaluation.target_returns"] = [0.0]
    if "evaluation.max_timesteps" in keys:
        stand_ins["evaluation.max_timesteps"] = 1
    if "model.max_timesteps" in keys:
        stand_ins["model.clamp_timesteps"] = True
    return decode_config(with_values(without_auto(tree)[0], stand_ins))


def _collect_command(config: RunConfig, keys: list[str]) -> str:
    """The command that collects what `data.collect` describes."""
    settings = config.data.collect
    assert settings is not None
    words = {
        "--env": config.env_id,
        "--env-kwargs": json.dumps(config.env_kwargs) if config.env_kwargs else None,
        "--behavior": settings.behavior,
        "--episodes": settings.num_episodes,
        "--seed": settings.seed,
        "--max-timesteps": None if "evaluation.max_timesteps" in keys else config.evaluation.max_timesteps,
        "--out": config.data.path,
    }
    given = [f"{word}" for option, value in words.items() if value is not None for word in (option, value)]
    return shlex.join(["python", "-m", "dt_ray.data", "collect", *given])


def _look_at_log(config: RunConfig, *, verbose: bool) -> tuple[LogOutline, ReadEpisodes | None]:
    """The outline of the log, and its episodes where this process read them and a run may take them from memory."""
    if config.data.is_function:
        log.info("looking at what %s makes", config.data.path)
    else:
        files = [file for path in config.data.paths for file in find_files(path, config.data.format)]
        size = sum(file.size for file in files)
        if _will_stream(files, config):
            return _outline_of_files(config, verbose=verbose), None
        if size < LARGE or config.scaling.num_workers == 0:
            source, read = return_source_of(config), ReadEpisodes()
            outline = make_outline((outline_rows(part, config, source) for part in read.read(config.data)), config)
            return outline, read if config.data.residency in ("auto", "resident") else None
        log.info("looking at %.0f MB of data", size / 2**20)
    from dt_ray.distributed.cluster import connection
    from dt_ray.distributed.data import outline_tables

    with connection(verbose=verbose):
        return make_outline(outline_tables(config), config), None


def _will_stream(files: Sequence[DatasetFile], config: RunConfig) -> bool:
    """Whether the run will stream the files, as far as that can be told before it is known which of them are sound."""
    if config.data.on_corrupt == "skip" or is_flat(files[0], config.data):
        return False
    return residency_by_size(decoded_size(files, config.data), config) == "streaming"


def _outline_of_files(config: RunConfig, *, verbose: bool) -> LogOutline:
    """The outline of a log that will be streamed: files that were seen before are not read."""
    if config.scaling.num_workers == 0:
        facts = FileFacts(config, None)
        return make_outline(facts.outline(facts.sound_files()[0]), config)
    from dt_ray.distributed.cluster import connection, user_errors
    from dt_ray.distributed.preparing import for_each_on_ray

    with connection(verbose=verbose), user_errors():
        facts = FileFacts(config, None, for_each=for_each_on_ray)
        return make_outline(facts.outline(facts.sound_files()[0]), config)


def _environment(
    env_id: str | None, env_kwargs: Mapping[str, Any], outline: LogOutline, *, is_derived: bool
) -> EnvironmentFacts | None:
    if env_id is None:
        return None
    if is_derived:
        check_names({"env_id": env_id}, source="the log")
    try:
        return read_environment(env_id, env_kwargs)
    except UnsupportedSpaceError as error:
        if not is_derived:
            raise
        raise UnsupportedSpaceError(f"{error}. The log names it; to train without it, env_id=null") from None

"""Turns the options of the data commands into values for the functions that do the work."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dt_ray.config.schema import ActionBounds, DataConfig


def env_kwargs_of(options: argparse.Namespace) -> dict[str, Any]:
    """The arguments of the environment's constructor that `--env-kwargs` gives.

    Raises:
        UserError: the text is no mapping of names, or there is no `--env`.
    """
    import yaml

    from dt_ray.errors import UserError

    try:
        values = yaml.safe_load(options.env_kwargs or "{}")
    except yaml.YAMLError:
        values = None
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise UserError(f"--env-kwargs takes {{NAME: VALUE}}, got {options.env_kwargs!r}")
    if values and not options.env:
        raise UserError("--env-kwargs are arguments of an environment: give --env ID too")
    return values


def action_bounds_of(text: str) -> ActionBounds:
    """The lowest and highest actions that `--action-bounds` gives.

    Raises:
        UserError: the text is not [[LOW …],[HIGH …]].
    """
    import yaml
    from pydantic import TypeAdapter, ValidationError

    from dt_ray.config.schema import ActionBounds
    from dt_ray.errors import UserError

    try:
        return TypeAdapter(ActionBounds).validate_python(yaml.safe_load(text))
    except (yaml.YAMLError, ValidationError):
        raise UserError(f"--action-bounds takes [[LOW …],[HIGH …]], got {text!r}") from None


def data_config_of(options: argparse.Namespace) -> DataConfig:
    """The section `data` of a configuration, out of the options of `import`, `describe` or `validate`.

    Raises:
        UserError: `--column` without a `=`, or `--clip` without an environment.
    """
    from dt_ray.config.schema import DataConfig
    from dt_ray.errors import UserError

    columns = {}
    for pair in options.column:
        ours, equals, theirs = pair.partition("=")
        if not equals:
            raise UserError(f"--column takes OURS=THEIRS, got {pair!r}")
        columns[ours.strip()] = theirs.strip() or None
    clip = getattr(options, "clip", False)
    if clip and not options.env:
        raise UserError("--clip clips actions to an environment's bounds: give --env ID too")
    return DataConfig(
        path=options.path,
        format=options.format,
        columns=columns,
        episodes_across_files={"auto": "auto", "true": True, "false": False}[options.episodes_across_files],
        episode_per_file=options.episode_per_file,
        action_scale=options.action_scale,
        time_limit=options.time_limit,
        out_of_bounds="clip" if clip else "stop",
    )

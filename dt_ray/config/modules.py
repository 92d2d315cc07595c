"""Controls which modules a run's files may import: only those that the user named.

A checkpoint may come from anywhere. `algorithm: module:Class`, `env_id: module:Name-v0` and `behavior: module:function`
in its files would run that module's code.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from dt_ray.config.schema import names_function
from dt_ray.errors import RunError

KEYS = ("algorithm", "env_id", "data.collect.behavior", "data.path")  # whose values may be `module:name`
_allowed: set[str] = set()


def allow_modules(*names: str | None) -> None:
    """From now on, in this process, files may name these modules, each given by itself or as `module:name`."""
    _allowed.update(module for name in names if name and (module := name.partition(":")[0]))


def allow_overrides(overrides: Iterable[str]) -> None:
    """Allows the modules that `section.key=value` overrides name: the user has typed them."""
    for key, _, value in (override.partition("=") for override in overrides):
        name = value.strip().strip("'\"")
        if key.strip() in KEYS and ":" in name and (key.strip() != "data.path" or names_function(name)):
            allow_modules(name)


def allowed_modules() -> tuple[str, ...]:
    """The modules allowed so far, to be handed to other processes of this run."""
    return tuple(sorted(_allowed))


def check_names(names: Mapping[str, str | None], *, source: str) -> None:
    """Raises:
    RunError: one of the values in a file, by their keys, names a module that the user has not named.
    """
    for key, name in names.items():
        module, colon, _ = (name or "").partition(":")
        if colon and "://" not in (name or "") and module not in _allowed:
            raise RunError(
                f"{source} names {key}={name}, which would run the module {module}; only packaged ones are taken from "
                f"files. If you trust it, name it yourself: --import {module}, or from Python "
                f"dt_ray.config.modules.allow_modules({module!r})"
            )

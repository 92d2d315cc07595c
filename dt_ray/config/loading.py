"""Makes a `RunConfig` of YAML files and `section.key=value` overrides; reports every problem in one message."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal, cast, get_args, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from dt_ray.config.conflicts import conflicts_in
from dt_ray.config.derived import AUTO, without_auto
from dt_ray.config.schema import (
    DEFAULT_CONFIG,
    NEUTRAL_CONFIG,
    EvaluationConfig,
    ModelConfig,
    RunConfig,
)
from dt_ray.errors import ConfigError

PACKAGED = Path(__file__).parent / "packaged"


def load_config(name_or_file: str, overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration of a file, a name under `./configs/` or a packaged name, with overrides applied in order.

    Raises:
        ConfigError: no such configuration, or its problems, one a line.
    """
    return decode_config(read_settings(name_or_file, overrides))


def read_settings(
    name_or_file: str | None,
    overrides: Sequence[str] = (),
    *,
    changes: Mapping[str, Any] | None = None,
    default: str = DEFAULT_CONFIG,
) -> dict[str, Any]:
    """The plain values of a configuration, of which some may say `auto`, with `changes` and then overrides applied.

    Without a name it is `default`, or, where they name a log or an environment, the neutral configuration.

    Raises:
        ConfigError: no such configuration, a malformed override, or a preset with another environment than its own.
    """
    given, problems = read_overrides(overrides)
    given = {**(changes or {}), **given}
    name = name_or_file or start_from(given, default=default)
    tree = read_yaml(find_config(name))
    if problems:
        decode_config(without_auto(tree)[0], overrides)  # reports these problems together with the others
    if not Path(name).is_file():  # a file of the user's own is the user's to change
        check_environment(tree, given.get("env_id"), preset=name)
    return with_values(tree, given)


def start_from(given: Mapping[str, Any], *, default: str = DEFAULT_CONFIG) -> str:
    """The configuration to start from where none is named: the neutral one if these dotted keys name a log."""
    named = any(key.startswith("data.mix.") or key in ("data.path", "data.mix", "env_id") for key in given)
    return NEUTRAL_CONFIG if named else default


def check_environment(tree: Mapping[str, Any], env_id: Any, *, preset: str) -> None:
    """Raises:
    ConfigError: a preset is to be used in another environment than its own.
    """
    own = tree.get("env_id", AUTO)
    if own != AUTO and env_id is not None and env_id != own:
        raise ConfigError(
            f"{preset} is for {own}: its returns, time limit and units are that environment's. For {env_id}, leave "
            f"out the preset, and what can be derived from the log and the environment is: python -m dt_ray.train "
            f"env_id={env_id} data.path=LOG"
        )


def find_config(name_or_file: str, kind: Literal["run", "sweep"] = "run") -> Path:
    """The file meant by a path, else by a name in `./configs/`, else by a packaged name; sweeps are in `sweep/`."""
    named = f"sweep/{name_or_file}.yaml" if kind == "sweep" else f"{name_or_file}.yaml"
    for place in (Path(name_or_file), Path("configs") / named, PACKAGED / named):
        if place.is_file():
            return place
    known = packaged_names(kind)
    close = difflib.get_close_matches(name_or_file, known, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    what = "sweep" if kind == "sweep" else "configuration"
    raise ConfigError(f"no {what} {name_or_file!r}: no such file, and no such name among {', '.join(known)}{hint}")


def packaged_names(kind: Literal["run", "sweep"] = "run") -> list[str]:
    names = sorted(path.relative_to(PACKAGED).with_suffix("").as_posix() for path in PACKAGED.rglob("*.yaml"))
    return [name.removeprefix("sweep/") for name in names if name.startswith("sweep/") == (kind == "sweep")]


def read_yaml(file: Path) -> dict[str, Any]:
    return parse_yaml(file.read_text(), source=str(file))


def parse_yaml(text: str, *, source: str) -> dict[str, Any]:
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{source} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{source}: expected `key: value` lines, found {type(values).__name__}")
    return cast("dict[str, Any]", values)


def decode_config(values: Mapping[str, Any], overrides: Sequence[str] = ()) -> RunConfig:
    """Checks a tree of plain values and makes it a `RunConfig`.

    Raises:
        ConfigError: unknown keys, wrong types, values out of range and conflicts, all in one message.
    """
    changes, problems = read_overrides(overrides)
    tree, derived = without_auto(with_values(values, changes))
    problems += [f"{key}: auto is derived from the log when a new run is started; give a value here" for key in derived]
    problems += _unknown_keys(tree, RunConfig)
    config = None
    try:
        config = _adapter(RunConfig).validate_python(tree)
    except ValidationError as error:
        # The branches of a union report one by one, under names of their own: the first speaks for all of them.
        found = {_location(problem["loc"]): problem for problem in reversed(error.errors())}
        for location, problem in reversed(found.items()):
            if problem["type"] == "missing":
                problems.append(f"{location}: is needed")
            else:
                problems.append(f"{location}: {problem['msg']}, got {problem['input']!r}")
    if config is not None:
        problems += conflicts_in(config)
    if problems:
        raise ConfigError(_listed(problems))
    assert config is not None
    return config


def decode_settings(cls: type[Any], values: Mapping[str, Any], *, section: str) -> tuple[Any, list[str]]:
    """An instance of a dataclass made of plain values, and the problems, one line each; None where there are any."""
    known = dotted_keys(cls, f"{section}.")
    problems = [_unknown_key(f"{section}.{key}", known) for key in values if f"{section}.{key}" not in known]
    try:
        made = _adapter(cls).validate_python(values)
    except ValidationError as error:
        for each in error.errors():
            place = ".".join([section, *map(str, each["loc"])])
            is_missing = each["type"] == "missing"
            problems.append(f"{place}: is needed" if is_missing else f"{place}: {each['msg']}, got {each['input']!r}")
        made = None
    return None if problems else made, problems


def _listed(problems: Sequence[str]) -> str:
    lines = "\n".join(f"  {line}" for line in problems)
    return f"{len(problems)} problem(s) in the configuration:\n{lines}"


def check_config(config: RunConfig) -> RunConfig:
    """Checks a configuration made in Python as strictly as one that was read.

    Raises:
        ConfigError: all of its problems in one message.
    """
    return decode_config(to_plain(config))


def change_evaluation(evaluation: EvaluationConfig, model: ModelConfig, **changes: Any) -> EvaluationConfig:
    """The settings with those `changes` that are not None, checked against the model that is to act.

    Raises:
        ConfigError: all problems in one message.
    """
    given = {key: value for key, value in changes.items() if value is not None}
    return check_config(RunConfig(model=model, evaluation=dataclasses.replace(evaluation, **given))).evaluation


def to_yaml(config: RunConfig) -> str:
    """The whole configuration, every field written out; `load_config` of it gives an equal one."""
    return yaml.safe_dump(to_plain(config), sort_keys=False)


def to_plain(config: Any) -> dict[str, Any]:
    """A configuration, or one section of it, as dicts, lists, strings and numbers."""
    return _adapter(cast("type[Any]", type(config))).dump_python(config, mode="json")


@cache
def _adapter(cls: type) -> TypeAdapter[Any]:
    return TypeAdapter(cls)


def read_overrides(overrides: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """The values given as `section.key=value`, by their dotted keys, and a line for each malformed override."""
    changes: dict[str, Any] = {}
    problems: list[str] = []
    for override in overrides:
        dotted, equals, text = override.partition("=")
        if not equals or not dotted:
            problems.append(f"{override}: an override is section.key=value")
            continue
        try:
            changes[dotted] = yaml.safe_load(text)
        except yaml.YAMLError:
            problems.append(f"{dotted}: {text!r} is not a YAML value; quote it if it is text")
    return changes, problems


def with_values(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a tree of plain values with those of dotted keys changed."""
    tree = _copy(values)
    for dotted, value in changes.items():
        node, *rest = tree, *dotted.split(".")
        for part in rest[:-1]:
            if not isinstance(node.get(part), dict):
                node[part] = {}
            node = node[part]
        node[rest[-1]] = value
    return tree


def _copy(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _copy(cast("Mapping[str, Any]", value)) if isinstance(value, Mapping) else value
        for key, value in values.items()
    }


def _location(path: Sequence[str | int]) -> str:
    """The dotted key that a problem's path means: the parts of it that users can write."""
    known, parts = dotted_keys(RunConfig), list[str]()
    for part in path:
        if isinstance(part, int) or ".".join([*parts, part]) in known:
            parts.append(str(part))
    return ".".join(parts)


def _unknown_keys(tree: Mapping[str, Any], cls: type, prefix: str = "") -> list[str]:
    sections = dict(_sections(cls))
    known = {field.name for field in dataclasses.fields(cls)}
    lines: list[str] = []
    for key, value in tree.items():
        if key not in known:
            lines.append(_unknown_key(f"{prefix}{key}", dotted_keys(RunConfig)))
        elif key in sections and isinstance(value, Mapping):
            lines += _unknown_keys(cast("Mapping[str, Any]", value), sections[key], f"{prefix}{key}.")
    return lines


def _unknown_key(key: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1)
    return f"{key}: no such key" + (f"; did you mean {close[0]}?" if close else "")


def dotted_keys(cls: type, prefix: str = "") -> list[str]:
    """The keys of a section and of the sections in it, as users write them."""
    keys = [f"{prefix}{field.name}" for field in dataclasses.fields(cls)]
    for key, section in _sections(cls):
        keys += dotted_keys(section, f"{prefix}{key}.")
    return keys


def _sections(cls: type) -> Iterator[tuple[str, type]]:
    """The fields of a section that are sections themselves."""
    for key, hint in get_type_hints(cls).items():
        for candidate in (hint, *get_args(hint)):
            if dataclasses.is_dataclass(candidate) and isinstance(candidate, type):
                yield key, candidate

"""Derives settings that say `auto` from facts about a log and an environment, each with the reason for its value.

Legend: E episodes, A action dimension.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_left
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray

from dt_ray.config.schema import RunConfig
from dt_ray.errors import ConfigError

AUTO = "auto"
KEYS = (
    *("env_id", "total_timesteps"),
    *("data.action_bounds", "data.return_scale", "data.validation_fraction"),
    *("model.context_length", "model.num_layers", "model.width", "model.max_timesteps", "model.clamp_timesteps"),
    *("evaluation.target_returns", "evaluation.max_timesteps", "evaluation.every"),
    *("evaluation.random_return", "evaluation.reference_return", "checkpoint.every"),
)  # the settings that may say `auto`
DERIVED_WHEN_ABSENT = ("env_id", "evaluation.target_returns", "evaluation.max_timesteps")

BOUNDS_MARGIN = 0.05  # of a dimension's logged range, added on either side: the best action may lie a little outside
BATCH_SIZE, CONTEXT_LENGTH = 64, 20  # of the neutral configuration
USUAL_CONTEXT = "as usual; 1 trains faster and obeys better where an observation says all"  # docs/mujoco.md
HELD_OUT = 0.05  # of the episodes, for the validation loss
HELD_OUT_ALONE = 0.1  # where evaluations have nothing else
MAX_TIMESTEPS = 10_000  # rows of the timestep table: later steps share the last one
NUM_PASSES = 50  # over the log's steps
FEWEST_UPDATES, MOST_UPDATES = 1000, 5000
SMALL_LOG = 20_000  # steps; a smaller log trains the small model
SMALL_MODEL, MODEL = {"width": 64, "num_layers": 2}, {"width": 128, "num_layers": 2}
NUM_EVALUATIONS = 5
MAX_DISPLAYED = 6  # values of a list that a table shows
QUANTILES = {"best": 1.0, "90%": 0.9, "median": 0.5}


@dataclass(frozen=True, kw_only=True)
class LogOutline:
    """The facts about a log from which settings are derived."""

    observation_dim: int
    action_low: Float[ndarray, "A"]  # smallest logged action of each dimension
    action_high: Float[ndarray, "A"]
    is_low_a_limit: Bool[ndarray, "A"]  # many actions are exactly the smallest one
    is_high_a_limit: Bool[ndarray, "A"]
    may_be_choices: bool  # all actions, as whole numbers
    may_be_one_hot: bool  # all actions, as one-hot vectors
    lengths: Int[ndarray, "E"]
    returns: Float[ndarray, "E"]  # the target return that corresponds to each episode
    largest_to_go: float  # size of a return-to-go
    env_id: str | None = None  # the environment that the log names
    env_kwargs: Mapping[str, Any] = field(default_factory=dict[str, Any])
    is_relabeled: bool = False  # learned values take the place of the logged returns-to-go

    @property
    def num_steps(self) -> int:
        return int(self.lengths.sum())

    @property
    def longest(self) -> int:
        return int(self.lengths.max())


@dataclass(frozen=True, kw_only=True)
class EnvironmentFacts:
    """Facts about an environment: its own, and published returns."""

    env_id: str
    time_limit: int | None  # steps
    has_bounds: bool  # of its actions, in every dimension
    action_low: tuple[float, ...]  # infinite where there is none
    action_high: tuple[float, ...]
    reference_returns: tuple[float, float] | None = None  # random and reference
    reference_source: str = ""


@dataclass(frozen=True, kw_only=True)
class Derived:
    """A setting, its value and the reason for it."""

    key: str
    value: Any
    why: str

    @property
    def shown(self) -> str:
        """The value as YAML writes it, numbers and long lists shortened."""
        return _show(self.value)


def undecided_keys(tree: Mapping[str, Any]) -> list[str]:
    """The keys whose values are `auto`, or that are left out and count as `auto` then."""
    return [key for key in KEYS if _value(tree, key) == AUTO]


def without_auto(tree: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A configuration's plain values without those that are `auto`, and the keys of these."""
    rest: dict[str, Any] = {}
    keys: list[str] = []
    for name, value in tree.items():
        inner = _section(value)
        said = [f"{name}.{key}" for key, each in inner.items() if each == AUTO and f"{name}.{key}" in KEYS]
        if value == AUTO and name in KEYS:
            keys.append(name)
            continue
        keys += said
        rest[name] = {key: each for key, each in inner.items() if f"{name}.{key}" not in said} if said else value
    return rest, keys


def _section(value: Any) -> Mapping[str, Any]:
    """The values of a section; none where a value is no section."""
    return cast("Mapping[str, Any]", value) if isinstance(value, Mapping) else {}


def _value(tree: Mapping[str, Any], key: str) -> Any:
    section, dot, name = key.rpartition(".")
    values = _section(tree.get(section)) if dot else tree
    absent = AUTO if key in DERIVED_WHEN_ABSENT else None
    return values.get(name, absent)


def derive(
    keys: Collection[str],
    log: LogOutline,
    environment: EnvironmentFacts | None,
    *,
    given: RunConfig,
    sizes: Sequence[Derived] = (),
) -> list[Derived]:
    """Derives the settings `keys`, except `env_id`, which decides what `environment` is.

    Settings of `given` that are not among `keys` are the user's, and what depends on them follows them. `sizes` of the
    model and of the training are a learner's own, and take the place of the usual ones.

    Raises:
        ConfigError: the actions are one-hot vectors, and neither an environment nor the user gives them bounds.
    """
    if "data.action_bounds" in keys and environment is None and log.may_be_one_hot:
        bounds = json.dumps([log.action_low.tolist(), log.action_high.tolist()])
        raise ConfigError(
            f"every action of the log is a one-hot vector, a choice among {len(log.action_low)}; dt_ray trains on "
            f"continuous actions only. If these are continuous, name their bounds: 'data.action_bounds={bounds}'"
        )
    played = None if "evaluation.max_timesteps" in keys else given.evaluation.max_timesteps
    num_updates = None if "total_timesteps" in keys else given.total_timesteps
    found = [
        _bounds(log, environment),
        _held_out(log, environment),
        _return_scale(log),
        _targets(log),
        *_time_limits(log, environment, played=played),
        *_references(environment),
        *_size(log, num_updates=num_updates, seen=_steps_seen(keys, given)),
    ]
    own = {each.key: each for each in sizes}
    return [own.get(each.key, each) for each in found if each.key in keys]


def beyond_the_log(target_returns: Sequence[float], log: LogOutline) -> Derived | None:
    """A note on the user's target returns that are outside of the logged returns; None where there are none."""
    low, high = float(log.returns.min()), float(log.returns.max())
    beyond = [target for target in target_returns if math.isfinite(target) and not low <= target <= high]
    if not beyond:
        return None
    listed = ", ".join(f"{target:g}" for target in beyond)
    why = f"as given; beyond the data, whose returns are {low:.4g} .. {high:.4g}: {listed}"
    return Derived(key="evaluation.target_returns", value=list(target_returns), why=why)


def weighted_quantile(values: Float[ndarray, "E"], weights: Float[ndarray, "E"], share: float) -> float:
    """The smallest value up to which a share of the weights lies."""
    order = np.argsort(values, kind="stable")
    below = np.cumsum(weights[order])
    return float(values[order][min(bisect_left(below, share * below[-1]), len(values) - 1)])


def _bounds(log: LogOutline, environment: EnvironmentFacts | None) -> Derived:
    key = "data.action_bounds"
    if environment is not None and environment.has_bounds:
        return Derived(key=key, value="environment", why=f"those of {environment.env_id}")
    margin = BOUNDS_MARGIN * (log.action_high - log.action_low)
    low = log.action_low - np.where(log.is_low_a_limit, 0, margin)
    high = log.action_high + np.where(log.is_high_a_limit, 0, margin)
    if environment is not None:
        low, high = np.maximum(low, environment.action_low), np.minimum(high, environment.action_high)
    why = f"the log's smallest and largest, and {BOUNDS_MARGIN:.0%} of its range beyond those that are no limits"
    if environment is None and log.may_be_choices:
        why += "; all are small whole numbers: if they are choices (discrete actions), dt_ray can't learn them"
    return Derived(key=key, value=[_rounded(low, 6), _rounded(high, 6)], why=why)


def _held_out(log: LogOutline, environment: EnvironmentFacts | None) -> Derived:
    key, num = "data.validation_fraction", len(log.lengths)
    if environment is not None:
        return Derived(key=key, value=HELD_OUT, why="of the episodes, for the validation loss")
    if num == 1:
        return Derived(key=key, value=0.0, why="the log is one episode: none can be held out, so nothing is evaluated")
    fraction = max(HELD_OUT_ALONE, math.ceil(1000 / num) / 1000)
    return Derived(key=key, value=fraction, why="of the episodes: without an environment they are what is evaluated on")


def _return_scale(log: LogOutline) -> Derived:
    key = "data.return_scale"
    if log.is_relabeled:
        return Derived(key=key, value=None, why="1 / the largest size of a return-to-go, once learned")
    if log.largest_to_go == 0:
        return Derived(key=key, value=1.0, why="every return-to-go is 0")
    return Derived(
        key=key, value=1 / log.largest_to_go, why=f"1 / the largest size of a return-to-go, {_short(log.largest_to_go)}"
    )


def _targets(log: LogOutline) -> Derived:
    weights = log.lengths.astype(np.float64)
    found = {name: weighted_quantile(log.returns, weights, share) for name, share in QUANTILES.items()}
    names: dict[float, list[str]] = {}  # of a target: in many logs the best return is the 90% quantile too
    for name, target in zip(found, _rounded(list(found.values()), 4), strict=True):
        names.setdefault(target, []).append(name)
    said = ", ".join(" and ".join(each) for each in names.values())
    return Derived(
        key="evaluation.target_returns",
        value=list(names),
        why=f"{said} of the log's returns, an episode counted by its steps",
    )


def _time_limits(log: LogOutline, environment: EnvironmentFacts | None, *, played: int | None) -> Iterator[Derived]:
    limit = None if environment is None else environment.time_limit
    played = played or limit or log.longest
    longest = f"the longest episode of the log has {log.longest} steps"
    yield Derived(
        key="evaluation.max_timesteps",
        value=played,
        why=longest if limit is None or environment is None else f"the limit of {environment.env_id}",
    )
    needed = max(played, log.longest)
    is_clamped = needed > MAX_TIMESTEPS
    shared = "" if not is_clamped else f", and steps from {MAX_TIMESTEPS} on share the last row"
    yield Derived(key="model.max_timesteps", value=min(needed, MAX_TIMESTEPS), why=f"a row for each step{shared}")
    why = "the timestep table would be larger than the rest of the model" if is_clamped else "the table has every step"
    yield Derived(key="model.clamp_timesteps", value=is_clamped, why=why)
    yield Derived(
        key="model.context_length", value=min(CONTEXT_LENGTH, log.longest),
        why=USUAL_CONTEXT if log.longest >= CONTEXT_LENGTH else longest,
    )  # fmt: skip


def _references(environment: EnvironmentFacts | None) -> Iterator[Derived]:
    keys = ("evaluation.random_return", "evaluation.reference_return")
    if environment is None or environment.reference_returns is None:
        name = "there is no environment" if environment is None else f"none are published for {environment.env_id}"
        yield from (Derived(key=key, value=None, why=f"{name}: no score") for key in keys)
        return
    for key, value, score in zip(keys, environment.reference_returns, (0, 1), strict=True):
        yield Derived(key=key, value=value, why=f"score {score}, {environment.reference_source}")


def _steps_seen(keys: Collection[str], given: RunConfig) -> int:
    """The steps of an update: those of the neutral configuration, or fewer if the user says so."""
    context_length = CONTEXT_LENGTH if "model.context_length" in keys else given.model.context_length
    return min(BATCH_SIZE * CONTEXT_LENGTH, given.optim.batch_size * context_length)


def _size(log: LogOutline, *, num_updates: int | None, seen: int) -> Iterator[Derived]:
    is_small = log.num_steps < SMALL_LOG
    size = "fewer than" if is_small else "at least"
    for name, value in (SMALL_MODEL if is_small else MODEL).items():
        yield Derived(key=f"model.{name}", value=value, why=f"{log.num_steps} steps, {size} {SMALL_LOG}")
    wanted = math.ceil(NUM_PASSES * log.num_steps / seen / FEWEST_UPDATES) * FEWEST_UPDATES
    most = MOST_UPDATES * BATCH_SIZE * CONTEXT_LENGTH // seen
    num = num_updates or min(max(wanted, FEWEST_UPDATES), most)
    why = f"{NUM_PASSES} passes over the log, within {FEWEST_UPDATES} .. {most}: minutes on two cores"
    yield Derived(key="total_timesteps", value=num, why=f"{why}; raise it, then model.width, for a better policy")
    for section in ("evaluation", "checkpoint"):
        why = f"{NUM_EVALUATIONS} {section}s in all"
        yield Derived(key=f"{section}.every", value=max(1, num // NUM_EVALUATIONS), why=why)


def _rounded(values: Sequence[float] | Float[ndarray, "N"], digits: int) -> list[float]:
    return [float(f"{value:.{digits}g}") for value in values]


def _show(value: Any) -> str:
    if isinstance(value, list):
        listed = [_show(each) for each in cast("list[Any]", value)]
        if len(listed) > MAX_DISPLAYED:
            listed = [*listed[: MAX_DISPLAYED // 2], f"… {len(listed)} in all"]
        return f"[{', '.join(listed)}]"
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _short(value: float) -> str:
    return f"{value:.4g}"

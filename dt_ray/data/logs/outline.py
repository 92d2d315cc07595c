"""The outline of a log, from which settings that say `auto` are derived; it is gathered part by part."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from jaxtyping import Float
from numpy import ndarray

from dt_ray.config.derived import LogOutline
from dt_ray.config.schema import RunConfig
from dt_ray.data.formats.minari import read_minari_environment
from dt_ray.data.formats.tables import read_schema
from dt_ray.data.logs.checks import are_choices, are_one_hot
from dt_ray.data.logs.episodes import read_metadata
from dt_ray.data.logs.files import DatasetFile, find_files
from dt_ray.data.transitions import TransitionDataset, chosen_episodes
from dt_ray.errors import DataError

SHARE_AT_LIMIT = 0.01  # of the steps: where so many actions are exactly the smallest, or largest, that is a limit
FEWEST_AT_LIMIT = 2


def outline_rows(
    data: TransitionDataset, config: RunConfig, source: Literal["column", "rewards"] | None = None
) -> pa.Table:
    """A row for each episode with the facts that `make_outline` needs; returns-to-go come from `source`."""
    data = data if config.relabels else data.with_return_source(source)
    to_go, lowest = data.to_go(config.data.discount), np.minimum.reduceat(data.actions, data.starts)
    return pa.table(
        {
            "episode_id": data.episode_ids,
            "length": data.lengths,
            "episode_return": data.episode_returns,
            "asked_return": np.asarray(to_go[data.starts], np.float64),
            "largest_to_go": np.maximum.reduceat(np.abs(to_go), data.starts),
            "observation_dim": np.full(data.num_episodes, data.observations.shape[1]),
            "are_choices": np.logical_and.reduceat(are_choices(data.actions), data.starts),
            "are_one_hot": np.logical_and.reduceat(are_one_hot(data.actions), data.starts),
            **_extremes("lowest", data, lowest),
            **_extremes("highest", data, np.maximum.reduceat(data.actions, data.starts)),
        }
    )


def _extremes(name: str, data: TransitionDataset, extremes: Float[ndarray, "E A"]) -> dict[str, list[ndarray]]:
    """The extreme actions of each episode, and how many of its steps have them."""
    are_extreme = data.actions == np.repeat(extremes, data.lengths, axis=0)
    counts = np.add.reduceat(are_extreme.astype(np.int64), data.starts)
    return {f"{name}_action": list(extremes), f"num_{name}": list(counts)}


def make_outline(parts: Iterable[pa.Table], config: RunConfig) -> LogOutline:
    """The outline out of the rows of all parts, of the episodes that the run takes.

    Raises:
        DataError: there is no episode, or the log names environments that differ.
    """
    table = pa.concat_tables(list(parts))
    if not len(table):
        raise DataError(f"{', '.join(config.data.paths)} is empty: there is no episode in it")
    chosen = chosen_episodes(
        table["episode_id"].to_numpy(),
        table["episode_return"].to_numpy(),
        max_episodes=config.data.max_episodes,
        top_fraction=config.data.top_fraction,
    )
    table = table.take(pa.array(chosen))
    env_id, env_kwargs = named_environment(config)
    lowest, highest, num_lowest, num_highest = (
        np.stack(table[name].to_numpy()) for name in ("lowest_action", "highest_action", "num_lowest", "num_highest")
    )
    low, high = lowest.min(axis=0), highest.max(axis=0)
    many = max(FEWEST_AT_LIMIT, SHARE_AT_LIMIT * table["length"].to_numpy().sum())
    varies = bool((high > low).any())
    return LogOutline(
        env_id=env_id,
        env_kwargs=env_kwargs,
        observation_dim=table["observation_dim"][0].as_py(),
        action_low=low,
        action_high=high,
        is_low_a_limit=(num_lowest * (lowest == low)).sum(axis=0) >= many,
        is_high_a_limit=(num_highest * (highest == high)).sum(axis=0) >= many,
        lengths=table["length"].to_numpy(),
        returns=table["asked_return"].to_numpy(),
        may_be_choices=varies and bool(table["are_choices"].to_numpy().all()),
        may_be_one_hot=varies and bool(table["are_one_hot"].to_numpy().all()),
        largest_to_go=float(table["largest_to_go"].to_numpy().max()),
        is_relabeled=config.relabels,
    )


def named_environment(config: RunConfig) -> tuple[str | None, dict[str, Any]]:
    """The id and the arguments of the environment that a log's metadata names: those of our datasets and of Minari's.

    Raises:
        DataError: datasets that are mixed name different ones.
    """
    if config.data.is_function:
        return None, {}
    files = [find_files(path, config.data.format)[0] for path in config.data.paths]
    named = {file.dataset: _environment_of(file) for file in files}
    first, *others = named
    for other in others:
        if named[other] != named[first]:
            raise DataError(
                f"{first} names the environment {named[first][0]} and {other} {named[other][0]}; say which one by "
                f"env_id=ID, or env_id=null for none"
            )
    return named[first]


def _environment_of(file: DatasetFile) -> tuple[str | None, dict[str, Any]]:
    if file.format == "minari":
        return read_minari_environment(file)
    if file.format != "parquet":
        return None, {}
    try:
        facts = read_metadata(read_schema(file))
    except (DataError, json.JSONDecodeError):  # reported when the data is read
        return None, {}
    return facts.get("env_id"), facts.get("env_kwargs", {})

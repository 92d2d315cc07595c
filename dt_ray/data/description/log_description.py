"""The facts that `describe` reports about a log, gathered file by file, as tables and as JSON.

Legend: E episodes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from dt_ray.data.description.clocks import FileClock
from dt_ray.data.description.column_facts import EqualColumns, Row, action_rows, column_names_of, column_rows
from dt_ray.data.description.episode_features import EpisodeFeatures, FeatureCollector
from dt_ray.data.description.next_command import settings_in
from dt_ray.data.description.outliers import Outlier
from dt_ray.data.description.signals import find_outliers
from dt_ray.data.description.tables import (
    Table,
    best_rows,
    clock_tables,
    outlier_note,
    outlier_rows,
    quantile_rows,
)
from dt_ray.data.description.traps import LogFacts, StateOf, log_traps, step_traps
from dt_ray.data.logs.files import DatasetFile
from dt_ray.data.spaces import SpaceSpec
from dt_ray.data.transitions import TransitionDataset
from dt_ray.errors import DataError


@dataclass(frozen=True, kw_only=True)
class LogDescription:
    """The description of a log."""

    path: str
    returns: Float[ndarray, "E"]
    lengths: Int[ndarray, "E"]
    facts: Row
    tables: list[Table]
    traps: list[str]
    outliers: list[Outlier]
    features: EpisodeFeatures
    names: list[str]  # of the columns
    suggested_settings: dict[str, str]

    @property
    def outlier_rows(self) -> list[Row]:
        return self.tables[-1].rows

    def as_json(self) -> dict[str, Any]:
        """The description as numbers and texts."""
        return {
            "path": self.path,
            "facts": self.facts,
            **{table.name: table.rows for table in self.tables},
            "looks_wrong": self.traps,
        }


@dataclass
class LogDescriber:
    """Gathers the facts about a log part by part; each part is read once."""

    path: str
    columns: dict[str, str | None]  # `data.columns`
    env_id: str | None = None
    env_kwargs: Mapping[str, Any] | None = None
    spec: SpaceSpec | None = None
    state_of: StateOf | None = None
    observation_bounds: tuple[ndarray, ndarray] | None = None
    features: FeatureCollector = field(default_factory=FeatureCollector)
    equal: EqualColumns = field(default_factory=EqualColumns)
    names: list[str] = field(default_factory=list[str])
    num_unended: int = 0
    log_facts: LogFacts | None = None
    part_traps: list[str] = field(default_factory=list[str])
    outside: dict[str, ndarray] = field(default_factory=dict[str, ndarray])  # steps outside of --env's bounds, by kind

    def add(self, part: TransitionDataset) -> None:
        """Adds some episodes."""
        self.names = self.names or column_names_of(part, self.columns)
        self._check_dimensions(part)
        self.features.add(part)
        self.equal.add(part)
        last = part.ends - 1
        self.num_unended += int((~part.terminated[last] & ~part.truncated[last]).sum())
        self.log_facts = LogFacts.of(part) if self.log_facts is None else self.log_facts.joined(LogFacts.of(part))
        self.part_traps = self.part_traps or list(
            step_traps(part, self.spec, self.env_id, self.env_kwargs, state_of=self.state_of)
        )
        for kind, values, bounds in (
            ("observation", part.observations, self.observation_bounds),
            ("action", part.actions, None if self.spec is None else (self.spec.action_low, self.spec.action_high)),
        ):
            if bounds is not None:
                low, high = (np.asarray(each, np.float64) for each in bounds)
                margin = 1e-4 * np.where(np.isfinite(high - low), high - low, 0.0)
                num = ((values < low - margin) | (values > high + margin)).sum(axis=0)
                self.outside[kind] = self.outside.get(kind, 0) + num

    def _check_dimensions(self, part: TransitionDataset) -> None:
        if self.spec is None:
            return
        for kind, have, want in (
            ("observations", part.observations.shape[1], self.spec.observation_dim),
            ("actions", part.actions.shape[1], self.spec.action_dim),
        ):
            if have != want:
                raise DataError(
                    f"{self.path}: {kind} have {have} dimension(s) where {self.env_id} has {want}; leave out --env, or "
                    f"name the columns by --column {kind[:-1]}=NAME,NAME"
                )

    def finish(
        self,
        files: Sequence[DatasetFile],
        clocks: Sequence[FileClock | None],
        bounds: tuple[Sequence[float], Sequence[float]] | None = None,
    ) -> LogDescription:
        """The description; `bounds` are those of actions that the log itself names.

        Raises:
            DataError: there was no episode.
        """
        if self.log_facts is None:
            raise DataError(f"{self.path} is empty: there is no episode in it")
        features = self.features.joined()
        traps = log_traps(self.log_facts, self.spec, self.env_id, self.env_kwargs, self.columns)
        traps = [*traps, *self.part_traps]
        if self.spec is not None and self.spec.is_bounded:
            bounds = self.spec.action_low, self.spec.action_high
        outliers = find_outliers(features, self.names)
        tables = self._tables(features, outliers, bounds, files, clocks)
        return LogDescription(
            path=self.path,
            returns=features.returns,
            lengths=features.lengths,
            facts=self._facts(features, files, clocks),
            tables=[table for table in tables if table.rows or table.name == "outliers"],
            traps=traps,
            outliers=outliers,
            features=features,
            names=self.names,
            suggested_settings=settings_in(traps),
        )

    def _tables(
        self,
        features: EpisodeFeatures,
        outliers: Sequence[Outlier],
        bounds: tuple[Sequence[float], Sequence[float]] | None,
        files: Sequence[DatasetFile],
        clocks: Sequence[FileClock | None],
    ) -> list[Table]:
        known_bounds = None if bounds is None else (np.asarray(bounds[0], float), np.asarray(bounds[1], float))
        whose = (
            self.env_id
            if self.spec is not None
            else "the log's metadata"
            if bounds
            else "the log's smallest and largest"
        )
        return [
            Table(name="quantiles", title="Returns and lengths of episodes", rows=quantile_rows(features)),
            Table(
                name="columns",
                title="Columns",
                rows=column_rows(features, self.names, self.equal.groups),
                note="Quantiles are those of steps sampled at equal distances from every episode.",
            ),
            Table(
                name="actions",
                title="How much of the actions' bounds is used",
                rows=action_rows(features, self.names, known_bounds),
                note=f"Bounds: of {whose}. A policy learns little about actions that the log does not have.",
            ),
            Table(
                name="best_decile",
                title="The best tenth of the episodes",
                rows=best_rows(features),
                note="What filtered behaviour cloning with data.top_fraction=0.1 would train on.",
            ),
            *self._outside_tables(),
            *clock_tables(files, clocks),
            Table(
                name="outliers",
                title="Episodes that are unlike the others",
                rows=outlier_rows(outliers, features, files, clocks),
                note=outlier_note(features, outliers),
            ),
        ]

    def _facts(
        self, features: EpisodeFeatures, files: Sequence[DatasetFile], clocks: Sequence[FileClock | None]
    ) -> Row:
        num, terminated = features.num_episodes, int(features.is_terminated.sum())
        unended = self.num_unended
        ended = [clock.num_ended for clock in clocks if clock is not None and clock.num_ended is not None]
        if ended:  # episodes without an end are read as truncated
            unended = min(max(unended, num - sum(ended)), num - terminated)
        copies = num - len(np.unique(features.digests))
        facts: Row = {
            "episodes": num,
            "steps": int(features.lengths.sum()),
            "files": len({file.path for file in files}),
            "observation dimensions": features.observation_dim,
            "action dimensions": features.action_dim,
            "terminated": terminated,
            "truncated": num - terminated - unended,
            "no end": unended,
        }
        return facts | ({"copies of other episodes": copies} if copies else {})

    def _outside_tables(self) -> list[Table]:
        num = sum(self.log_facts.lengths) if self.log_facts is not None else 0
        names = {"observation": self.names, "action": self.names[-1 - len(self.outside.get("action", [])) :]}
        rows: list[Row] = [
            {"column": names[kind][i], "steps outside": int(count), "share": f"{count / num:.2%}"}
            for kind, counts in self.outside.items()
            for i, count in enumerate(counts)
            if count
        ]
        return [Table(name="outside", title=f"Outside the bounds of {self.env_id}", rows=rows)] if rows else []

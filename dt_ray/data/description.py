"""What a log holds, gathered file by file: the facts of `describe`, as tables and as JSON.

Legend: E episodes.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from dt_ray.data.clocks import FileClock, name_episodes
from dt_ray.data.column_facts import EqualColumns, Row, action_rows, column_names_of, column_rows
from dt_ray.data.episode_features import EpisodeFeatures, FeatureCollector
from dt_ray.data.files import DatasetFile, resolve
from dt_ray.data.outliers import FEWEST_EPISODES, Outlier
from dt_ray.data.signals import find_outliers
from dt_ray.data.spaces import SpaceSpec
from dt_ray.data.summary import QUANTILES
from dt_ray.data.transitions import TransitionDataset
from dt_ray.data.traps import LogFacts, find_log_traps, find_part_traps
from dt_ray.errors import DataError

BEST_SHARE = 0.1  # of the episodes: the best decile
MAX_SHOWN_GAPS = 20
TIME_LIMIT = re.compile(r"data\.time_limit=(\d+)")


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows under a title; `note` says how to read them."""

    name: str
    title: str
    rows: list[Row]
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class LogDescription:
    """All that is said of a log."""

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
        """The same as numbers and texts."""
        return {
            "path": self.path,
            "facts": self.facts,
            **{table.name: table.rows for table in self.tables},
            "looks_wrong": self.traps,
        }


@dataclass
class LogDescriber:
    """Gathers the facts about a log, part by part, each part once."""

    path: str
    columns: dict[str, str | None]  # `data.columns`
    env_id: str | None = None
    env_kwargs: Mapping[str, Any] | None = None
    spec: SpaceSpec | None = None
    observation_bounds: tuple[ndarray, ndarray] | None = None
    features: FeatureCollector = field(default_factory=FeatureCollector)
    equal: EqualColumns = field(default_factory=EqualColumns)
    names: list[str] = field(default_factory=list)
    num_unended: int = 0
    log_facts: LogFacts | None = None
    part_traps: list[str] = field(default_factory=list)
    outside: dict[str, ndarray] = field(default_factory=dict)  # steps outside the bounds of --env, by kind

    def add(self, part: TransitionDataset) -> None:
        """Looks at some episodes."""
        self.names = self.names or column_names_of(part, self.columns)
        self._check_dimensions(part)
        self.features.add(part)
        self.equal.add(part)
        last = part.ends - 1
        self.num_unended += int((~part.terminated[last] & ~part.truncated[last]).sum())
        self.log_facts = LogFacts.of(part) if self.log_facts is None else self.log_facts.joined(LogFacts.of(part))
        self.part_traps = self.part_traps or list(find_part_traps(part, self.spec, self.env_id, self.env_kwargs))
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
        traps = find_log_traps(self.log_facts, self.spec, self.env_id, self.env_kwargs, self.columns)
        traps = [*traps, *self.part_traps]
        if self.spec is not None and self.spec.is_bounded:
            bounds = self.spec.action_low, self.spec.action_high
        outliers = find_outliers(features, self.names)
        known_bounds = None if bounds is None else (np.asarray(bounds[0], float), np.asarray(bounds[1], float))
        whose = (
            self.env_id
            if self.spec is not None
            else "the log's metadata"
            if bounds
            else "the log's smallest and largest"
        )
        tables = [
            Table(name="quantiles", title="Returns and lengths of episodes", rows=_quantile_rows(features)),
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
                rows=_best_rows(features),
                note="What filtered behaviour cloning with data.top_fraction=0.1 would train on.",
            ),
            *self._outside_tables(),
            *_clock_tables(files, clocks),
            Table(
                name="outliers",
                title="Episodes that are unlike the others",
                rows=_outlier_rows(outliers, features, files, clocks),
                note=_outlier_note(features, outliers),
            ),
        ]
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
            suggested_settings=_settings_in(traps),
        )

    def _facts(
        self, features: EpisodeFeatures, files: Sequence[DatasetFile], clocks: Sequence[FileClock | None]
    ) -> Row:
        num, terminated = features.num_episodes, int(features.is_terminated.sum())
        unended = self.num_unended
        if any(clock is not None for clock in clocks):  # rows without an end are read as cut
            unended += max(0, num - unended - sum(clock.num_ended for clock in clocks if clock is not None))
            unended = min(unended, num - terminated)
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


def next_command(log: LogDescription, *, imports: bool, settings: Mapping[str, str | None], env_id: str | None) -> str:
    """What to type next: pack the log where that spares reading it again and again, else train on it.

    `settings` are those of `data` with which it was read.
    """
    settings = {**log.suggested_settings, **settings}
    if not imports:
        words = [f"data.path={log.path}", *([f"env_id={env_id}"] if env_id else [])]
        words += [f"data.{name}={'null' if value is None else value}" for name, value in settings.items()]
        return shlex.join(["python", "-m", "dt_ray.train", *words])
    options = ["--env", env_id] if env_id else []
    for name, value in settings.items():
        ours = name.removeprefix("columns.")
        options += (
            ["--column", f"{ours}={value or ''}"] if ours != name else [f"--{name.replace('_', '-')}", f"{value}"]
        )
    name = re.sub(r"\W+", "-", log.path.rstrip("/").rpartition("/")[2].partition(".")[0]).strip("-") or "log"
    return shlex.join(["python", "-m", "dt_ray.data", "import", log.path, *options, "--out", f"data/{name}-packed"])


def _settings_in(traps: Sequence[str]) -> dict[str, str]:
    """The settings that the faults ask for and that change nothing else."""
    found = [match[1] for trap in traps if (match := TIME_LIMIT.search(trap))]
    return {"time_limit": found[0]} if found else {}


def _quantile_rows(features: EpisodeFeatures) -> list[Row]:
    rows: list[Row] = []
    for name, values in (("return", features.returns), ("steps an episode", features.lengths)):
        quantiles = {f"{share:.0%}": float(np.quantile(values, share)) for share in QUANTILES}
        rows.append({"": name, **quantiles, "mean": float(values.mean()), "std": float(values.std())})
    return rows


def _best_rows(features: EpisodeFeatures) -> list[Row]:
    """How many steps the best tenth of the episodes has, and how good it is beside the rest."""
    num = max(1, int(np.ceil(BEST_SHARE * features.num_episodes)))
    order = np.argsort(-features.returns, kind="stable")
    steps = int(features.lengths.sum())
    return [
        {
            "episodes": name,
            "number": len(chosen),
            "steps": int(features.lengths[chosen].sum()),
            "share of all steps": f"{features.lengths[chosen].sum() / steps:.1%}",
            "lowest return": float(features.returns[chosen].min()),
            "mean return": float(features.returns[chosen].mean()),
            "highest return": float(features.returns[chosen].max()),
        }
        for name, chosen in (("best tenth", order[:num]), ("the others", order[num:]))
        if len(chosen)
    ]


def _clock_tables(files: Sequence[DatasetFile], clocks: Sequence[FileClock | None]) -> list[Table]:
    timed = [clock for clock in clocks if clock is not None and clock.usual > 0]
    if not timed:
        return []
    rates: list[Row] = []
    for column in dict.fromkeys(clock.column for clock in timed):
        those = [clock for clock in timed if clock.column == column and not clock.counts_steps]
        if not those:
            continue
        usual = np.array([clock.usual for clock in those])
        unit = "second" if all(clock.is_in_seconds for clock in those) else f"unit of {column}"
        rates.append(
            {
                "column": column,
                f"steps a {unit}": float(1 / np.median(usual)),
                "slowest file": float(1 / usual.max()),
                "fastest file": float(1 / usual.min()),
                "5% of intervals below": float(np.median([clock.quick for clock in those])),
                "usual interval": float(np.median(usual)),
                "5% above": float(np.median([clock.slow for clock in those])),
                "gaps": sum(clock.num_gaps for clock in those),
            }
        )
    gaps = sorted((gap for clock in timed for gap in clock.gaps), key=lambda gap: -gap.interval / gap.usual)
    rows: list[Row] = [
        {
            "episode": gap.episode,
            "after step": gap.step,
            "waits": gap.interval,
            "usually": gap.usual,
            "file": _inside(gap.path, files[0]),
        }
        for gap in gaps[:MAX_SHOWN_GAPS]
    ]
    num = sum(clock.num_gaps for clock in timed)
    return [
        Table(name="rates", title="Rates", rows=rates),
        Table(
            name="gaps",
            title="Gaps",
            rows=rows,
            note=f"{num} wait(s) inside episodes of more than 3 times the file's usual interval, the longest first.",
        ),
    ]


def _outlier_rows(
    found: Sequence[Outlier],
    features: EpisodeFeatures,
    files: Sequence[DatasetFile],
    clocks: Sequence[FileClock | None],
) -> list[Row]:
    places = name_episodes(features.episode_ids[[each.episode for each in found]], files, clocks) if found else []
    return [
        {
            "episode": label,
            "what": ", ".join(each.kinds[:2]),
            "score": round(each.score, 1),
            "from step": each.step,
            "why": "; ".join(each.reasons),
            "file": None if path is None or len(files) == 1 else _inside(path, files[0]),
        }
        for each, (label, path) in zip(found, places, strict=True)
    ]


def _inside(path: str, file: DatasetFile) -> str:
    """A file's path inside its dataset."""
    return path.removeprefix(resolve(file.dataset)[1]).strip("/")


def _outlier_note(features: EpisodeFeatures, outliers: Sequence[Outlier]) -> str:
    if features.num_episodes < FEWEST_EPISODES:
        return f"Not looked for: with fewer than {FEWEST_EPISODES} episodes there are no others to be unlike."
    if not outliers:
        return "None stands out."
    return (
        f"{len(outliers)} of {features.num_episodes}, the most unusual first. The score counts robust standard deviations "
        f"from the median episode; 5 and more are shown. Unusual is not wrong: look before you leave any out."
    )

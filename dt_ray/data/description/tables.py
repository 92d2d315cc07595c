"""The tables of a log's description.

Legend: E episodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dt_ray.data.description.clocks import FileClock, name_episodes
from dt_ray.data.description.column_facts import Row
from dt_ray.data.description.episode_features import EpisodeFeatures
from dt_ray.data.description.outliers import FEWEST_EPISODES, THRESHOLD, Outlier
from dt_ray.data.logs.files import DatasetFile, resolve
from dt_ray.data.summary import QUANTILES

BEST_SHARE = 0.1  # of the episodes: the best decile
MAX_SHOWN_GAPS = 20


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows under a title; `note` says how to read them."""

    name: str
    title: str
    rows: list[Row]
    note: str = ""


def quantile_rows(features: EpisodeFeatures) -> list[Row]:
    rows: list[Row] = []
    for name, values in (("return", features.returns), ("steps an episode", features.lengths)):
        quantiles = {f"{share:.0%}": float(np.quantile(values, share)) for share in QUANTILES}
        rows.append({"": name, **quantiles, "mean": float(values.mean()), "std": float(values.std())})
    return rows


def best_rows(features: EpisodeFeatures) -> list[Row]:
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


def clock_tables(files: Sequence[DatasetFile], clocks: Sequence[FileClock | None]) -> list[Table]:
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


def outlier_rows(
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


def outlier_note(features: EpisodeFeatures, outliers: Sequence[Outlier]) -> str:
    if features.num_episodes < FEWEST_EPISODES:
        return f"Not looked for: with fewer than {FEWEST_EPISODES} episodes there are no others to be unlike."
    if not outliers:
        return "None stands out."
    return (
        f"{len(outliers)} of {features.num_episodes}, the most unusual first. The score counts robust standard "
        f"deviations from the median episode; above {THRESHOLD:g} an episode is listed, of each kind the strongest. "
        f"Unusual is not wrong: look before you leave any out."
    )

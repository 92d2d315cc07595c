"""Writing a report: figures, tables, and the page that holds all of them."""

from __future__ import annotations

import base64
import io
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
import torch
from matplotlib.figure import Figure

from dt_ray.config.schema import EvaluationConfig
from dt_ray.config.targets import show_target
from dt_ray.data.spaces import needed_environment
from dt_ray.environments import pendulum
from dt_ray.errors import RunError
from dt_ray.play.rollout import rollout
from dt_ray.reports import figures
from dt_ray.reports.animations import record_episodes
from dt_ray.reports.held_out import TEXT as HELD_OUT_TEXT
from dt_ray.reports.held_out import action_error_rows, draw_action_errors
from dt_ray.reports.offline import TEXT as OFFLINE_TEXT
from dt_ray.reports.offline import draw_estimates, estimate_rows, offline_reports, reached_by
from dt_ray.reports.records import (
    Group,
    ReturnsByTarget,
    RunRecord,
    aggregate_rows,
    data_returns,
    improvement_rows,
    learning_rows,
    read_groups,
    time_rows,
)
from dt_ray.runs.checkpoint import PolicyFacts, load_policy
from dt_ray.runs.folder import checkpoint_at
from dt_ray.runs.storage import Folder
from dt_ray.sweeps.config import SweepConfig
from dt_ray.sweeps.folder import SweepFolder
from dt_ray.sweeps.tables import Row, over_seeds, read_rows, write_table

PAGE = Path(__file__).parent / "report.html.jinja"
NUM_TRACES = 6


class Report:
    """The parts of a report, written as they are made."""

    def __init__(self, out: Folder) -> None:
        self.out = out
        self.files: list[str] = []
        self.sections: list[dict[str, Any]] = []

    def add_figure(self, name: str, title: str, figure: Figure, text: str, rows: Sequence[Row] = ()) -> None:
        """Writes NAME.png and, with rows, NAME.csv, and shows the picture on the page."""
        image = io.BytesIO()
        figure.savefig(image, format="png", dpi=130)
        self._add_image(f"{name}.png", image.getvalue(), title, text)
        if rows:
            self._write_table(f"{name}.csv", rows)

    def add_animation(self, name: str, title: str, image: bytes) -> None:
        self._add_image(f"{name}.gif", image, title, "")

    def add_table(self, name: str, title: str, rows: Sequence[Row], text: str) -> None:
        """Writes NAME.csv and shows the rows on the page."""
        self._write_table(f"{name}.csv", rows)
        table = pd.DataFrame(list(rows), dtype=object)
        cells = table.map(_cell).to_numpy().tolist()
        self.sections.append({"title": title, "text": text, "columns": list(table), "rows": cells})

    def write_page(self, title: str, summary: Sequence[tuple[str, str]]) -> None:
        """Writes report.html, which needs no other file."""
        environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
        page = environment.from_string(PAGE.read_text())
        html = page.render(title=title, summary=summary, sections=self.sections)
        (self.out / "report.html").write_text(html)
        self.files.insert(0, "report.html")

    def _add_image(self, name: str, image: bytes, title: str, text: str) -> None:
        (self.out / name).write_bytes(image)
        self.files.append(name)
        kind = name.rpartition(".")[2]
        source = f"data:image/{kind};base64,{base64.b64encode(image).decode()}"
        self.sections.append({"title": title, "text": text, "image": source})

    def _write_table(self, name: str, rows: Sequence[Row]) -> None:
        write_table(rows, self.out / name)
        self.files.append(name)


def write_report(places: Sequence[str], out: Folder, *, video: bool = False) -> list[str]:
    """Reports on runs and sweeps; returns the names of the files written, the page first.

    Raises:
        RunError: a place is neither a run nor a sweep, or nothing was evaluated there.
    """
    groups, sweeps = read_groups(places)
    report = Report(out)
    played = [group for group in groups if all(each.targets for each in group.last)]
    replayed = [group for group in groups if all(each.held_out for each in group.last)]
    if replayed:
        rows = action_error_rows(replayed)
        report.add_figure("action_errors", "Held-out actions", draw_action_errors(replayed), HELD_OUT_TEXT, rows)
    if estimates := offline_reports(groups):
        rows, drawn = estimate_rows(estimates), draw_estimates(estimates, reached_by(groups))
        report.add_figure("offline", "Estimated from the log alone", drawn, OFFLINE_TEXT)
        report.add_table(
            "offline_estimates", "Estimates", rows, "A verdict says when an estimate should not be believed."
        )
    if played:
        _add_obedience(report, played)
    for sweep, folder in sweeps:
        _add_sweep(report, sweep, folder)
    report.add_figure(
        "learning", "Learning", figures.draw_learning(groups),
        "Bands are 95% intervals of the mean over seeds (Student's t).", learning_rows(groups),
    )  # fmt: skip
    if played:
        _add_returns(report, played)
    times = time_rows(groups)
    report.add_figure("time", "Time", figures.draw_time(times, groups), "", times)
    if played:
        _add_episodes(report, _best_run(played), video=video)
    elif video:
        needed_environment(None, "a video")
    names = ", ".join(Folder.at(place).name for place in places)
    report.write_page(f"{groups[0].runs[0].config.env_id or 'held-out episodes'}: {names}", _summary(groups))
    return report.files


def _by_target(groups: Sequence[Group]) -> dict[str, ReturnsByTarget]:
    return {group.label: group.by_target() for group in groups}


def _add_obedience(report: Report, groups: Sequence[Group]) -> None:
    if not any(map(figures.with_numbers, _by_target(groups).values())):
        return
    dataset = data_returns(groups[0].runs[0].config)
    report.add_figure(
        "obedience", "Obedience", figures.draw_obedience(_by_target(groups), dataset),
        "The mean return of the newest evaluation against the return that was asked for. Small dots are single seeds, "
        "or the episodes where there is one run; bars 95% intervals of the mean: over seeds where there are several, "
        "else over episodes. Above, the returns of the episodes in the data; shaded, targets beyond them.",
    )  # fmt: skip


def _add_returns(report: Report, groups: Sequence[Group]) -> None:
    shown = f" The first {figures.MAX_VIOLIN_GROUPS} groups." if len(groups) > figures.MAX_VIOLIN_GROUPS else ""
    report.add_figure(
        "returns", "Returns of episodes", figures.draw_episode_returns(_by_target(groups)),
        f"Every episode of the newest evaluations; the black line is the median.{shown}",
    )  # fmt: skip
    report.add_table(
        "aggregates", "Aggregates", aggregate_rows(groups),
        "iqm: the mean of the middle half of all episodes (Agarwal et al. 2021), with its 95% interval over that many "
        "seeds (Student's t over the jackknife); of one seed, over its episodes alone.",
    )  # fmt: skip
    if len(groups) > 1:
        report.add_table(
            "improvement", "Probability of improvement", improvement_rows(groups),
            "How likely an episode of the row's group gets more than one of the column's, at the highest target.",
        )  # fmt: skip


def _add_sweep(report: Report, sweep: SweepConfig, folder: SweepFolder) -> None:
    metric = sweep.settings.metric
    rows = [
        {
            **each.settings,
            metric: each.mean,
            f"{metric}_ci95_low": each.interval and each.interval[0],
            f"{metric}_ci95_high": each.interval and each.interval[1],
            "seeds": len(each.rows),
        }
        for each in over_seeds(read_rows(sweep, folder), sweep)
    ]
    keys = [axis.key for axis in sweep.axes if axis.key in rows[0]]
    name = folder.folder.name
    if sweep.base.env_id is None:
        report.add_table(f"sweep-{name}", f"{name}: {metric.replace('_', ' ')}", rows, "Means over seeds.")
        return
    labels = [", ".join(f"{key.rpartition('.')[2]} {_cell(row[key])}" for key in keys) for row in rows]
    cells = pd.DataFrame(rows).assign(label=[label or name for label in labels])
    cells = cells.pivot_table(metric, "label", "target_return", sort=False).sort_index(axis=1)
    report.add_figure(
        f"heatmap-{name}", f"{name}: {metric.replace('_', ' ')}", figures.draw_heatmap(cells, metric=metric),
        "Each row was trained once a seed; the columns are evaluations of the same models.", rows,
    )  # fmt: skip
    if keys:
        drawn = figures.draw_parallel(rows, [*keys, "target_return"], metric=metric)
        report.add_figure(f"parallel-{name}", f"{name}: all settings", drawn, "A line is a setting; bright is high.")


def _best_run(groups: Sequence[Group]) -> RunRecord:
    """The run with the highest mean return at any target."""
    runs = [run for group in groups for run in group.runs]
    return max(runs, key=lambda run: run.evaluations[-1].highest_mean)


def _add_episodes(report: Report, run: RunRecord, *, video: bool) -> None:
    """Adds plots of the policy's first evaluation episode, and an animation if `video`."""
    config, env_id = run.config, needed_environment(run.config.env_id, "an episode to show")
    is_pendulum = config.env_id == pendulum.ENV_ID
    if not (video or is_pendulum):
        return
    torch.set_num_threads(1)
    try:
        policy, facts = load_policy(checkpoint_at(run.folder.folder), config.evaluation)
    except RunError as error:
        if video:
            raise
        report.sections.append({"title": "Episodes", "text": f"no checkpoint to play: {error}"})
        return
    name = run.folder.folder.name
    targets = _spread(sorted(run.evaluations[-1].return_means, reverse=True))
    if is_pendulum:
        played = {
            target: rollout(
                policy,
                env_id,
                seeds=[config.evaluation.seed],
                target_returns=[target],
                max_timesteps=config.evaluation.max_timesteps,
                env_kwargs=config.env_kwargs,
            )
            for target in targets
        }
        report.add_figure(
            "traces", f"One episode of {name}", figures.draw_pendulum_traces(played),
            f"The same start (seed {config.evaluation.seed}) at each target return.",
        )  # fmt: skip
    for target in targets if video else ():
        report.add_animation(
            f"episode_target_{show_target(target)}",
            f"{name}, asked for {show_target(target)}",
            _record(policy, facts, replace(config.evaluation, target_returns=(target,))),
        )


def _record(policy: Any, facts: PolicyFacts, evaluation: EvaluationConfig) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "episode.gif"
        env_id = needed_environment(facts.env_id, "a video")
        record_episodes(policy, env_id, evaluation, str(file), env_kwargs=facts.env_kwargs)
        return file.read_bytes()


def _spread(targets: Sequence[float]) -> list[float]:
    """At most `NUM_TRACES` of the targets, from the first to the last."""
    if len(targets) <= NUM_TRACES:
        return list(targets)
    return [targets[round(i * (len(targets) - 1) / (NUM_TRACES - 1))] for i in range(NUM_TRACES)]


def _summary(groups: Sequence[Group]) -> list[tuple[str, str]]:
    config = groups[0].runs[0].config
    lengths = sorted({len(group.runs) for group in groups})
    return [
        ("environment", config.env_id or "none: evaluated on held-out episodes of the log"),
        ("algorithm", ", ".join(sorted({run.config.algorithm for group in groups for run in group.runs}))),
        ("data", ", ".join(config.data.paths)),
        ("groups", f"{len(groups)}, of {' to '.join(map(str, {lengths[0], lengths[-1]}))} run(s)"),
        ("updates", ", ".join(map(str, sorted({run.evaluations[-1].step for g in groups for run in g.runs})))),
        ("runs", ", ".join(str(run.folder) for group in groups for run in group.runs)),
    ]


def _cell(value: Any) -> str:
    if value is None or value != value:  # missing
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)

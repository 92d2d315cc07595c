"""The page of a log: the tables of its description with pictures."""

from __future__ import annotations

from dt_ray.data.description.log_description import LogDescription
from dt_ray.reports import log_figures
from dt_ray.reports.page import Report
from dt_ray.runs.storage import Folder


def write_log_page(log: LogDescription, out: Folder, *, command: str) -> list[str]:
    """Writes report.html with its pictures and tables; returns the names of the files, the page first."""
    report = Report(out)
    labels = [f"{row['episode']}" for row in log.outlier_rows]
    report.add_figure(
        "episodes", "Episodes", log_figures.draw_episodes(log, labels),
        "Above, how many episodes have which return and length; below, the return of each.",
    )  # fmt: skip
    for table in log.tables:
        report.add_table(table.name, table.title, table.rows, table.note)
        if table.name == "columns":
            report.add_figure(
                "column_values", "What the columns hold", log_figures.draw_columns(log),
                "How often each value is there, over steps sampled at equal distances from every episode.",
            )  # fmt: skip
        if table.name == "actions":
            report.add_figure(
                "action_values", "Actions of bad and good episodes", log_figures.draw_actions(log),
                "Each tenth of the episodes by itself, from the lowest returns to the highest. Bright: often.",
            )  # fmt: skip
    summary = [(name, f"{value}") for name, value in log.facts.items()]
    summary += [("looks wrong", trap) for trap in log.traps]
    report.write_page(f"{log.path}: what it holds", [*summary, ("next", command)])
    return report.files

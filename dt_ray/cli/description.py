"""The page that `python -m dt_ray.data describe` prints and writes."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from dt_ray.config.schema import DataConfig
    from dt_ray.data.description.clocks import FileClock
    from dt_ray.data.description.log_description import LogDescription, Table
    from dt_ray.data.logs.files import DatasetFile
    from dt_ray.data.transitions import TransitionDataset

WIDTH = 120  # characters where the output is no terminal
MAX_ROWS = 40  # printed of a table
MAX_OUTLIERS = 15
PACKED = ("parquet", "lerobot", "minari")  # formats that are read quickly again and again
MANY_FILES = 20
LARGE = 2**26  # bytes; a larger log that is no Parquet should be packed before training
READING_SETTINGS = ("format", "time_limit", "action_scale", "episodes_across_files", "episode_per_file")


def gather(
    parts: Iterable[TransitionDataset],
    files: Sequence[DatasetFile],
    clocks: Sequence[FileClock | None],
    config: DataConfig,
    *,
    env_id: str | None,
    env_kwargs: Mapping[str, Any],
) -> tuple[LogDescription, str]:
    """The description of a log, and the command to type next."""
    from dt_ray.data.description.log_description import LogDescriber
    from dt_ray.data.description.next_command import next_command
    from dt_ray.data.formats.tables import read_schema
    from dt_ray.data.logs.episodes import read_metadata
    from dt_ray.data.spaces import read_observation_bounds, read_spaces
    from dt_ray.environments.batched import known_state_of

    spec = read_spaces(env_id, env_kwargs) if env_id else None
    describer = LogDescriber(
        path=config.path,
        columns=config.columns,
        env_id=env_id,
        env_kwargs=env_kwargs,
        spec=spec,
        state_of=known_state_of(env_id),
        observation_bounds=read_observation_bounds(env_id, env_kwargs) if env_id else None,
    )
    for part in parts:
        describer.add(part)
    named = read_metadata(read_schema(files[0])) if files[0].format == "parquet" else {}
    bounds = (named["action_low"], named["action_high"]) if {"action_low", "action_high"} <= set(named) else None
    log = describer.finish(files, clocks, bounds)
    is_slow = files[0].format not in PACKED and (len(files) >= MANY_FILES or sum(file.size for file in files) >= LARGE)
    settings = {**log.suggested_settings, **_settings_of(config)}
    return log, next_command(config.path, imports=is_slow, settings=settings, env_id=env_id)


def print_description(log: LogDescription, command: str) -> None:
    """Prints the tables, what looks wrong, and the command to type next."""
    from rich.console import Console
    from rich.table import Table as RichTable

    from dt_ray.data.summary import DatasetSummary

    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    console.print(log.path, style="bold", highlight=False, markup=False, soft_wrap=True)
    facts = RichTable(show_header=False)
    for name, value in log.facts.items():
        facts.add_row(name, f"{value}")
    console.print(facts)
    for line in DatasetSummary(returns=[log.returns]).histogram():
        console.print(line, highlight=False)
    for table in log.tables:
        if table.name == "outliers":
            _print_outliers(table, console)
        else:
            _print_table(table, console)
    if log.traps:
        console.print("\nLooks wrong", style="bold")
        for trap in log.traps:
            console.print(f"- {trap}", highlight=False, markup=False)
    console.print("\nNext", style="bold")
    console.print(command, highlight=False, markup=False, soft_wrap=True)


def write_description(
    log: LogDescription, command: str, *, out: str | None, json_file: str | None, plot: str | None
) -> None:
    """Writes the outputs that were asked for: the page's folder, a JSON file, a picture of the returns."""
    if json_file:
        Path(json_file).parent.mkdir(parents=True, exist_ok=True)
        Path(json_file).write_text(json.dumps(_plain(log.as_json() | {"next": command}), indent=1) + "\n")
    if out:
        from dt_ray.reports.log_page import write_log_page
        from dt_ray.runs.storage import Folder

        folder = Folder.at(out)
        files = write_log_page(log, folder, command=command)
        print(f"wrote {folder / files[0]} and {len(files) - 1} pictures and tables", file=sys.stderr)
    if plot:
        from dt_ray.reports.figures import draw_dataset_returns, save_figure

        save_figure(draw_dataset_returns(log.returns, f"{log.path}: {len(log.returns)} episodes"), plot)


def _print_table(table: Table, console: Console) -> None:
    from rich.table import Table as RichTable

    console.print(f"\n{table.title}", style="bold")
    if table.rows:
        columns = list(dict.fromkeys(key for row in table.rows for key in row))
        columns = [name for name in columns if any(row.get(name) not in (None, "") for row in table.rows)]
        shown = RichTable()
        for name in columns:
            is_number = all(isinstance(row.get(name), int | float | None) for row in table.rows)
            shown.add_column(name, justify="right" if is_number else "left", overflow="fold")
        for row in table.rows[:MAX_ROWS]:
            shown.add_row(*(_cell(row.get(name)) for name in columns))
        console.print(shown, markup=False)
    _print_rest(table, MAX_ROWS, console)


def _print_outliers(table: Table, console: Console) -> None:
    """A line for each episode and one for each reason: sentences do not fit into columns."""
    console.print(f"\n{table.title}", style="bold")
    for row in table.rows[:MAX_OUTLIERS]:
        where = f" of {row['file']}" if row["file"] else ""
        since = "" if row["from step"] is None else f", from step {row['from step']}"
        console.print(f"episode {row['episode']}{where}: {row['what']}{since} (score {row['score']})", markup=False)
        for reason in f"{row['why']}".split("; "):
            console.print(f"    {reason}", highlight=False, markup=False)
    _print_rest(table, MAX_OUTLIERS, console)


def _print_rest(table: Table, most: int, console: Console) -> None:
    if len(table.rows) > most:
        console.print(f"and {len(table.rows) - most} more; --json FILE and --out DIR have all of them", highlight=False)
    if table.note:
        console.print(table.note, highlight=False, markup=False)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _settings_of(config: DataConfig) -> dict[str, str | None]:
    """The settings of `data` that differ from their defaults."""
    from dt_ray.config.schema import DataConfig

    usual = DataConfig()
    settings: dict[str, str | None] = {f"columns.{name}": value for name, value in config.columns.items()}
    for name in READING_SETTINGS:
        if (value := getattr(config, name)) != getattr(usual, name):
            settings[name] = f"{value}".lower() if isinstance(value, bool) else f"{value}"
    return settings


def _plain(value: Any) -> Any:
    """The value in JSON's own types; NaN and infinite numbers become null."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value

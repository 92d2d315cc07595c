"""The command to type after a log was described, with the settings that it needs."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence

TIME_LIMIT = re.compile(r"data\.time_limit=(\d+)")
FLAGS = ("episode_per_file",)  # options of the command that take no value


def next_command(path: str, *, imports: bool, settings: Mapping[str, str | None], env_id: str | None) -> str:
    """The command to type next: pack the log (`imports`), or train on it.

    `settings` are the settings of `data` that differ from their defaults.
    """
    if not imports:
        words = [f"data.path={path}", *([f"env_id={env_id}"] if env_id else [])]
        words += [f"data.{name}={'null' if value is None else value}" for name, value in settings.items()]
        return shlex.join(["python", "-m", "dt_ray.train", *words])
    options = ["--env", env_id] if env_id else []
    for name, value in settings.items():
        ours = name.removeprefix("columns.")
        if ours != name:
            options += ["--column", f"{ours}={value or ''}"]
        else:
            options += [f"--{name.replace('_', '-')}", *([] if name in FLAGS else [f"{value}"])]
    name = re.sub(r"\W+", "-", path.rstrip("/").rpartition("/")[2].partition(".")[0]).strip("-") or "log"
    return shlex.join(["python", "-m", "dt_ray.data", "import", path, *options, "--out", f"data/{name}-packed"])


def settings_in(traps: Sequence[str]) -> dict[str, str]:
    """The settings that mend these traps without changing anything else."""
    found = [match[1] for trap in traps if (match := TIME_LIMIT.search(trap))]
    return {"time_limit": found[0]} if found else {}

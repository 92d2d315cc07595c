"""What a benchmark has made before, so that it goes on where it was ended."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dt_ray.config.schema import RunConfig
from dt_ray.jobs.training import start_run
from dt_ray.runs.folder import RunFolder


def trained(config: RunConfig) -> RunFolder:
    """The run of a configuration, trained if it isn't there."""
    run = RunFolder.of(config)
    if not run.read_summary():
        start_run(config, overwrite=True)
    return run


def kept(file: Path) -> dict[str, Any]:
    """What a JSON file holds; nothing where there is none."""
    return json.loads(file.read_text()) if file.exists() else {}

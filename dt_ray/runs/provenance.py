"""Where a run comes from: versions, seeds, command line and machine."""

from __future__ import annotations

import contextlib
import platform
import subprocess
import sys
import time
from importlib import metadata
from typing import Any

from dt_ray.config.schema import RunConfig

PACKAGES = ("torch", "ray", "gymnasium", "numpy", "pyarrow")


def describe_environment(config: RunConfig) -> dict[str, Any]:
    """The content of `environment.json`: versions, seeds, command line and machine, but no environment variables."""
    revision = None
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        git = ["git", "rev-parse", "HEAD"]
        revision = subprocess.run(git, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    return {
        "dt_ray": _version("dt_ray"),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "git_revision": revision,
        "seeds": {"training": config.seed, "evaluation": config.evaluation.seed},
        "command_line": sys.argv,
        "machine": {"system": platform.platform(), "processor": platform.machine(), "host": platform.node()},
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _version(package: str) -> str | None:
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(package)
    return None

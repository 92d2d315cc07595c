"""What the commands do, for use from Python: train, resume, evaluate, load, act."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from dt_ray.config import RunConfig
from dt_ray.config_io import load_config
from dt_ray.errors import ConfigError, RunError
from dt_ray.runs import RunFolder, default_name
from dt_ray.storage import Folder

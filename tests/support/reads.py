"""Counts how often files are read."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from dt_ray.data.logs.files import DatasetFile


def count_reads(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often a module's `read_fragments` reads each file from now on, by the file's name."""
    counts: Counter[str] = Counter()
    read = module.read_fragments

    def count(file: DatasetFile, *args: Any, **options: Any) -> Any:
        counts[Path(file.path).name] += 1
        return read(file, *args, **options)

    monkeypatch.setattr(module, "read_fragments", count)
    return counts

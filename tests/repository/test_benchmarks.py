"""The benchmarks run, as far as this environment goes: the public implementations have one of their own."""

import subprocess
import sys
from pathlib import Path

import pytest
from support.examples import ROOT

BENCHMARKS = ROOT / "benchmarks"


@pytest.mark.nightly
@pytest.mark.slow
def test_the_comparison_measures_every_subject_that_is_installed(tmp_path: Path) -> None:
    command = [sys.executable, BENCHMARKS / "compare.py", "--quick", "--json", tmp_path / "figures.json"]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    for line in ("share of the matrix rate in an update, step layout", "evaluation of 8 targets x 12 episodes"):
        assert f"| {line} |" in process.stdout
    assert (tmp_path / "figures.json").exists()

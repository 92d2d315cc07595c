"""The documentation as a site, and the examples that nothing else runs."""

import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from support.examples import ROOT

import dt_ray


@pytest.mark.slow
def test_the_site_is_built_without_a_warning_and_has_the_reference(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    python, models = ((tmp_path / f"reference/{page}/index.html").read_text() for page in ("python", "models"))
    for name in ("DecisionTransformer.predict", "IQL.train", "train_decision_transformer"):
        assert f'id="dt_ray.api.{name}"' in python
    assert "Mean squared action error over real steps only" in models
    assert "target_returns" in (tmp_path / "reference/settings/index.html").read_text()


def reference_script() -> Callable[[int, int], dict[float, float]]:
    return runpy.run_path(str(ROOT / "examples/decision_transformer_pendulum_reference.py"))["main"]


@pytest.mark.slow
def test_the_reference_script_trains_and_plays() -> None:
    reached = reference_script()(20, 10)
    assert all(-2000 < value < 0 for value in reached.values())


@pytest.mark.nightly
def test_the_reference_script_learns_to_obey() -> None:
    reached = reference_script()(1500, 200)
    assert sorted(reached.values()) == list(reached.values())[::-1]
    assert reached[-130.0] - reached[-900.0] > 200


def test_no_file_is_left_half_merged() -> None:
    marks = tuple(mark * 7 for mark in "<>")
    texts = [
        ROOT / "README.md",
        *(file for folder in ("docs", "dt_ray", "tests") for file in (ROOT / folder).rglob("*.*")),
    ]
    for text in texts:
        if text.suffix in (".md", ".py", ".yaml"):
            assert not [line for line in text.read_text().splitlines() if line.startswith(marks)], text


def test_all_files_that_state_the_version_state_the_same() -> None:
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == dt_ray.__version__
    assert f"## {dt_ray.__version__}" in (ROOT / "CHANGELOG.md").read_text()

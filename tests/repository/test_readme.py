"""The README as a newcomer follows it, in the environment of the tests; its set-up is in test_installation.py."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.commands import blocks_of, lines_of, run_lines, run_script, with_less_to_do
from support.examples import ROOT

README = (ROOT / "README.md").read_text()
SHORTER = {  # the same command with less to do
    # On Ray in a fresh clone: test_installation.py.
    "python -m dt_ray.train name=pendulum": "total_timesteps=100 data.collect.num_episodes=50 scaling.num_workers=0",
    "python -m dt_ray.evaluate runs/pendulum": "--episodes 10",
    "python -m dt_ray.train name=hall": "total_timesteps=50 scaling.cpus_per_worker=1",
    "python -m dt_ray.train name=own": "scaling.num_workers=0",  # and resumed on Ray
    "python -m dt_ray.sweep": "max_concurrent=1 scaling.cpus_per_worker=1",  # in one process
}


def commands() -> list[str]:
    """All commands but those of make, of which one runs this, and the installation: see test_installation.py."""
    return [line for line in lines_of(README) if not line.startswith("make ") and "pip install" not in line]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Has the environment of the tests as its `.venv`."""
    (tmp_path / ".venv").symlink_to(sys.prefix)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    return tmp_path


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"} | {"PYTHONPATH": str(ROOT)}


def check(folder: Path, errors: str) -> None:
    """What the commands have made, on which the Python of the page works."""
    assert "Traceback" not in errors
    assert (folder / "obedience.png").stat().st_size > 10_000
    assert (folder / "runs/hall/report/action_errors.png").stat().st_size > 10_000
    for block in blocks_of(README, "python"):
        python = [sys.executable, "-c", block]
        subprocess.run(python, cwd=folder, env=environment(), check=True, capture_output=True)


def test_every_file_that_the_documents_name_is_there() -> None:
    for document in (ROOT / "README.md", *ROOT.glob("docs/**/*.md")):
        for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"


@pytest.mark.ray
@pytest.mark.no_cover  # tracing would slow the commands of a whole page
@pytest.mark.usefixtures("ray_cluster")
def test_the_readmes_commands_do_what_they_say(folder: Path) -> None:
    """With less to do, on the cluster of the tests."""
    lines = with_less_to_do(commands(), SHORTER)
    check(folder, run_lines(lines, cwd=folder, environment=environment()))


@pytest.mark.nightly
@pytest.mark.timeout(3600)
def test_the_readmes_commands_at_full_length(folder: Path) -> None:
    check(folder, run_script("\n".join(commands()), cwd=folder, environment=environment()).stderr)

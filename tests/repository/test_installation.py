"""A fresh clone and environment: the README's set-up commands, then an installed wheel in the clone's place."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from support.commands import blocks_of, run_script
from support.examples import ROOT

README = (ROOT / "README.md").read_text()


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone in whose `.venv` the README's command without make has installed dt_ray."""
    folder = tmp_path_factory.mktemp("fresh") / "dt_ray"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], check=True, capture_output=True)
    (folder.parent / "bin").mkdir()
    (folder.parent / "bin" / "python3").symlink_to(Path(sys.executable).resolve())
    install, main_job = first_commands()[1]
    assert "pip install" in install
    assert main_job == ".venv/bin/python -m dt_ray.train name=pendulum"  # as run by test_readme.py
    run_in(folder, install)
    return folder


def first_commands() -> list[list[str]]:
    """With make, and without."""
    return [block.splitlines() for block in blocks_of(README, "bash")[:2]]


def run_in(folder: Path, command: str) -> subprocess.CompletedProcess[str]:
    """A command as in a new terminal, in which `python3` is the interpreter of the tests."""
    environment = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "PYTHONPATH")}
    environment["PATH"] = f"{folder.parent}/bin:{environment['PATH']}"
    environment["PIP_NO_COMPILE"] = "1"  # modules are compiled when they are imported, and most never are
    done = run_script(command, cwd=folder, environment=environment)
    assert "Traceback" not in done.stderr
    return done


@pytest.mark.slow
def test_the_readmes_first_commands_train_in_a_fresh_clone(clone: Path) -> None:
    """The main job with fewer updates and episodes; at its full length it is a nightly test."""
    make_train, make_test = first_commands()[0]
    assert (make_train, make_test) == ('make train ARGS="name=pendulum"', "make test")
    less = "total_timesteps=50 evaluation.num_episodes=5 data.collect.num_episodes=50"
    done = run_in(clone, f'{make_train[:-1]} {less}"')
    assert "target return" in done.stdout
    assert (clone / "runs/pendulum/summary.json").exists()


@pytest.mark.slow
def test_a_wheel_run_from_another_folder_finds_its_configurations(clone: Path, tmp_path: Path) -> None:
    """In the fresh environment, where the wheel takes the clone's place."""
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path / "dist"), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True, cwd=tmp_path)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        files = set(archive.namelist())
    assert {
        "dt_ray/reports/report.html.jinja",
        "dt_ray/config/packaged/sweep/target_return_context_length.yaml",
    } <= files
    python, elsewhere = clone / ".venv/bin/python", tmp_path / "elsewhere"
    elsewhere.mkdir()
    run_in(elsewhere, f"{python} -m pip install --quiet --no-deps --force-reinstall {wheel}")
    assert "site-packages" in run_in(elsewhere, f"{python} -c 'import dt_ray; print(dt_ray.__file__)'").stdout
    command = f"{python} -m dt_ray.train --config decision_transformer/pendulum --print-config"
    assert "env_id: Pendulum-v1" in run_in(elsewhere, command).stdout

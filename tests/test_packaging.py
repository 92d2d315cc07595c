"""What only an installed wheel shows: configurations that live in the package and not in a checkout."""

import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_a_wheel_run_from_another_folder_finds_its_configurations(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path / "dist"), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True, cwd=tmp_path)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        files = set(archive.namelist())
    assert {"dt_ray/report.html.jinja", "dt_ray/configs/sweep/target_return_context_length.yaml"} <= files
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    # The dependencies of this environment, without dt_ray itself: printing a configuration needs few of them.
    install = [str(python), "-m", "pip", "install", "--quiet", "--no-deps", str(wheel)]
    subprocess.run(install, check=True, capture_output=True, cwd=tmp_path)
    needed = ["-c", str(ROOT / "constraints.txt"), "pydantic", "pyyaml", "annotated-types"]
    subprocess.run(
        [str(python), "-m", "pip", "install", "--quiet", *needed], check=True, capture_output=True, cwd=tmp_path
    )
    empty = tmp_path / "elsewhere"
    empty.mkdir()
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [str(python), "-m", "dt_ray.train", "--config", "decision_transformer/pendulum", "--print-config"]
    out = subprocess.run(command, check=True, capture_output=True, text=True, cwd=empty, env=environment).stdout
    assert "env_id: Pendulum-v1" in out
    where = [str(python), "-c", "import dt_ray; print(dt_ray.__file__)"]
    location = subprocess.run(where, check=True, capture_output=True, text=True, cwd=empty, env=environment).stdout
    assert str(tmp_path / "env") in location

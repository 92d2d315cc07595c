"""The README as a newcomer follows it: fresh clone, fresh environment, every command in its order."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README.read_text(), flags=re.DOTALL | re.MULTILINE)


def test_every_file_that_the_documents_name_is_there() -> None:
    for document in (README, *ROOT.glob("docs/**/*.md")):
        for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_readme_from_a_fresh_clone(tmp_path: Path) -> None:
    clone = tmp_path / "dt_ray"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True, capture_output=True)
    commands = [line for block in blocks("bash") for line in block.splitlines() if line and not line.startswith("#")]
    # `make test` is what runs this test.
    script = "\n".join(line for line in commands if line != "make test")
    environment = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "PYTHONPATH")}
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python3").symlink_to(Path(sys.executable).resolve())
    environment["PATH"] = f"{tmp_path}/bin:{environment['PATH']}"
    process = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=clone,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stdout[-3000:] + process.stderr[-3000:]
    assert "Traceback" not in process.stderr
    assert (clone / "obedience.png").stat().st_size > 10_000
    for block in blocks("python"):
        subprocess.run(
            [clone / ".venv/bin/python", "-c", block], cwd=clone, env=environment, check=True, capture_output=True
        )

"""The commands: in this process, which takes no start, or as a process of their own for exit codes and signals."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from unittest import mock

from dt_ray.cli.command import run_command


def start(module: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """`python -m dt_ray.MODULE` as a process of its own."""
    command = [sys.executable, "-m", f"dt_ray.{module}", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


def blocks_of(page: str, language: str) -> list[str]:
    """The blocks of code on a Markdown page."""
    return re.findall(rf"^```{language}\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE)


def lines_of(page: str) -> list[str]:
    """The command lines on a Markdown page, without comments."""
    lines = [line for block in blocks_of(page, "bash") for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def with_less_to_do(lines: Sequence[str], settings: Mapping[str, str]) -> list[str]:
    """The same lines; the one in which a command is found gets its settings."""
    found = list(lines)
    for command, less in settings.items():
        (place,) = [place for place, line in enumerate(found) if command in line]
        found[place] += f" {less}"
    return found


def run_script(script: str, *, cwd: Path, environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """Lines of a page as a shell runs them, up to the first that fails, and none does."""
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


def run_lines(lines: Sequence[str], *, cwd: Path, environment: Mapping[str, str]) -> str:
    """Lines of a page, those with commands of dt_ray in this process; what all of them write to stderr."""
    errors = ""
    for line in lines:
        if command := re.fullmatch(r"\S*python -m dt_ray\.(\w+) ?(.*)", line):
            done = run(command[1], *shlex.split(command[2]), cwd=cwd)
            assert done.returncode == 0, f"{line}\n{done.stderr[-3000:]}"
        else:
            done = run_script(line, cwd=cwd, environment=environment)
        errors += done.stderr
    return errors


def run(module: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The same in this process: exit code, stdout and stderr."""
    name = f"dt_ray.{module}"
    main = import_module(f"{name}.__main__" if module == "data" else name).main
    code = 0
    out, err = io.StringIO(), io.StringIO()
    with _as_if_started([name, *arguments], cwd), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            run_command(main)
        except SystemExit as exit:
            code = exit.code if isinstance(exit.code, int) else 1
    return subprocess.CompletedProcess([name, *arguments], code, out.getvalue(), err.getvalue())


def succeed(module: str, *arguments: str, cwd: Path) -> str:
    """What a command prints that does what it should."""
    done = run(module, *arguments, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


def fail(module: str, *arguments: str, cwd: Path) -> str:
    """The message of a command that the user has to mend."""
    done = run(module, *arguments, cwd=cwd)
    assert done.returncode == 2, (done.returncode, done.stderr)
    return done.stderr


@contextlib.contextmanager
def _as_if_started(words: list[str], cwd: Path) -> Iterator[None]:
    """The command line and working directory of a new process; what a command changes in this one is put back."""
    before, handler = Path.cwd(), signal.getsignal(signal.SIGTERM)
    log = logging.getLogger("dt_ray")
    handlers, level = log.handlers, log.level
    os.chdir(cwd)
    try:
        with mock.patch.object(sys, "argv", words):
            yield
    finally:
        os.chdir(before)
        signal.signal(signal.SIGTERM, handler)
        log.handlers = handlers
        log.setLevel(level)

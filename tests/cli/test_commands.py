"""The commands as a user types them: real processes, exit codes, one message and no traceback."""

import json
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from support.commands import fail, start, succeed
from support.examples import losses_of, make_episodes, tiny_overrides, write_episodes
from support.processes import WAIT_S, processes_of, wait_until

from dt_ray.cli.progress import Watcher
from dt_ray.config.schema import RunConfig
from dt_ray.data.logs.episodes import to_table
from dt_ray.evaluate import make_parser
from dt_ray.play.collection import flatten
from dt_ray.runs.folder import RunFolder
from dt_ray.runs.metrics import MetricsLog
from dt_ray.runs.storage import Folder


@pytest.fixture(scope="module")
def trained(pendulum_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    done = start("train", *tiny_overrides(pendulum_data, folder), cwd=folder)
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr
    assert "target return" in done.stdout
    assert f"python -m dt_ray.train --resume {folder}/runs/tiny" in done.stdout
    return folder / "runs" / "tiny"


def test_train_then_resume_then_evaluate(trained: Path, tmp_path: Path) -> None:
    succeed("train", "--resume", str(trained), "total_timesteps=24", cwd=tmp_path)
    summary = json.loads((trained / "summary.json").read_text())
    assert summary["step"] == 24
    arguments = ["--target-return", "-100", "-300", "--json", "report.json", "--plot", "obedience.png"]
    out = succeed("evaluate", str(trained), *arguments, cwd=tmp_path)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["targets"] == summary["last"]["targets"]
    assert "-300" in out
    assert (tmp_path / "obedience.png").stat().st_size > 10_000


def test_evaluate_takes_fewer_episodes_targets_and_steps_of_context(trained: Path, tmp_path: Path) -> None:
    checkpoint = trained / "checkpoints" / "step-00000020"
    arguments = ["--episodes", "1", "--target-return", "-50", "--context-length", "2", "--json", "report.json"]
    succeed("evaluate", str(checkpoint), *arguments, cwd=tmp_path)
    report = json.loads((tmp_path / "report.json").read_text())
    assert [len(target["episode_returns"]) for target in report["targets"]] == [1]
    assert "can't see more, got 9" in fail("evaluate", str(checkpoint), "--context-length", "9", cwd=tmp_path)
    assert "evaluation.num_episodes" in fail("evaluate", str(checkpoint), "--episodes", "0", cwd=tmp_path)
    assert "no run or checkpoint at" in fail("evaluate", "nowhere", cwd=tmp_path)
    assert "a picture is a .png" in fail("evaluate", str(checkpoint), "--plot", "x.txt", cwd=tmp_path)


def test_collect_import_describe_validate(tmp_path: Path) -> None:
    collect = ["collect", "--behavior", "mixed", "--episodes", "4", "--max-timesteps", "20", "--workers", "0"]
    succeed("data", *collect, "--out", "packed", cwd=tmp_path)
    succeed("data", *collect, "--out", "flat", "--flat", cwd=tmp_path)
    arguments = ["--env", "Pendulum-v1", "--licence", "CC0"]
    succeed("data", "import", "flat", "--out", "imported", *arguments, cwd=tmp_path)
    card = (tmp_path / "imported.README.md").read_text()
    for fact in ("| source | flat |", "| licence | CC0 |", "| episodes | 4 |", "| steps | 80 |", "█"):
        assert fact in card
    assert b'"env_id": "Pendulum-v1"' in pq.read_schema(tmp_path / "imported/part-00000.parquet").metadata[b"dt_ray"]
    packed, imported = (pq.read_table(tmp_path / name) for name in ("packed", "imported"))
    for name in ("episode_id", "observations", "actions", "rewards", "terminated", "truncated"):
        assert packed[name].to_pylist() == imported[name].to_pylist()
    out = succeed("data", "describe", "imported", "--plot", "returns.png", cwd=tmp_path)
    assert "80" in out
    assert "Returns and lengths of episodes" in out
    assert (tmp_path / "returns.png").stat().st_size > 10_000
    assert "4 episodes, 80 steps; fits Pendulum-v1" in succeed(
        "data", "validate", "packed", "--env", "Pendulum-v1", cwd=tmp_path
    )
    assert "--clip clips actions to an environment's bounds" in fail(
        "data", "import", "flat", "--out", "x", "--clip", cwd=tmp_path
    )
    assert "exists already" in fail("data", *collect, "--out", "packed", cwd=tmp_path)
    assert "the seeds 0..9999 are for evaluation" in fail("data", *collect, "--out", "x", "--seed", "5", cwd=tmp_path)
    assert "no discrete actions" in fail("data", *collect, "--out", "x", "--env", "CartPole-v1", cwd=tmp_path)
    assert "--column takes OURS=THEIRS" in fail("data", "describe", "flat", "--column", "x", cwd=tmp_path)


def test_a_checkpoint_collects(trained: Path, tmp_path: Path) -> None:
    arguments = [
        "--behavior",
        str(trained),
        "--episodes",
        "2",
        "--max-timesteps",
        "30",
        "--workers",
        "0",
        "--out",
        "own",
    ]
    succeed("data", "collect", *arguments, cwd=tmp_path)
    assert "2 episodes, 60 steps" in succeed("data", "validate", "own", "--env", "Pendulum-v1", cwd=tmp_path)


def test_validate_names_file_episode_and_fault(tmp_path: Path) -> None:
    data = make_episodes([4, 5])
    data.actions[6] = 2.5
    write_episodes(data, tmp_path / "bad" / "part.parquet")
    message = fail("data", "validate", "bad", "--env", "Pendulum-v1", cwd=tmp_path)
    assert "bad/part.parquet" in message
    assert "episode 1, step 2: action [2.5] is outside the environment's bounds" in message


BAD_INPUT = {
    "several at once": (["model.width=abc", "totl_timesteps=3"], "2 problem(s) in the configuration"),
    "no such configuration": (["--config", "decision_transformer/pendulm"], "did you mean"),
    "missing data": (["data.path=nowhere"], "no dataset at"),
    "discrete actions": (["env_id=CartPole-v1"], "continuous actions only"),
    "unknown algorithm": (["algorithm=dqn"], "algorithm: one of decision_transformer"),
    "context too short": (["model.context_length=0"], "greater than or equal to 1"),
    "context beyond the model's": (["evaluation.context_length=5"], "can't see more"),
    "episodes beyond the table": (["evaluation.max_timesteps=99"], "raise model.max_timesteps"),
    "no parquet": (["data.path=text"], "is not a readable Parquet file"),
    "rows without names": (["data.path=rows"], "name it with data.columns.observation=NAME"),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_one_message_and_leaves_nothing(name: str, pendulum_data: Path, tmp_path: Path) -> None:
    arguments, message = BAD_INPUT[name]
    for folder in ("text", "rows"):
        (tmp_path / folder).mkdir()
    (tmp_path / "text" / "a.parquet").write_text("no")
    rows = flatten(to_table(make_episodes([5]))).rename_columns(list("abcdefg"))
    pq.write_table(rows, tmp_path / "rows" / "a.parquet")
    assert message in fail("train", *tiny_overrides(pendulum_data, tmp_path), *arguments, cwd=tmp_path)
    assert not (tmp_path / "runs").exists()


def test_target_returns_that_mean_nothing_are_refused_in_words(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        make_parser().parse_args([str(trained), "--target-return", "most"])
    assert "a target return is a number, max or auto, got 'most'" in capsys.readouterr().err
    asking = partial(fail, "evaluate", str(trained), "--target-return", "max", cwd=tmp_path)
    assert "this policy does not know how much a state can give" in asking()
    assert "--plot draws returns against those asked for" in asking("--plot", "a.png")
    assert not (tmp_path / "a.png").exists()


def test_a_name_that_exists_is_refused(trained: Path, pendulum_data: Path, tmp_path: Path) -> None:
    before = (trained / "config.yaml").read_text()
    done = start("train", *tiny_overrides(pendulum_data, trained.parent.parent), cwd=tmp_path)
    assert (done.returncode, "Traceback" in done.stderr) == (2, False), done.stderr
    assert "exists already; choose another name=…, resume it with --resume" in done.stderr
    assert (trained / "config.yaml").read_text() == before


def stop_and_resume(number: int, pendulum_data: Path, folder: Path, *, num_workers: int) -> int:
    """Stops a run that would be endless once it trains, and goes on with it for a few updates."""
    settings = ["total_timesteps=1000000", f"scaling.num_workers={num_workers}", "evaluation.every=0"]
    settings += ["checkpoint.every=0", "logging.every=1"]
    command = [sys.executable, "-m", "dt_ray.train", *tiny_overrides(pendulum_data, folder), *settings]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    run = folder / "runs/tiny"
    wait_until(lambda: (run / "metrics.jsonl").exists() and (run / "metrics.jsonl").read_text(), what="no update")
    process.send_signal(number)
    _, error = process.communicate(timeout=WAIT_S)
    assert f"python -m dt_ray.train --resume {run}" in error
    assert "Traceback" not in error
    step = int((run / "checkpoints/latest").read_text().strip().removeprefix("step-"))
    assert json.loads((run / "summary.json").read_text())["status"] == "stopped"
    succeed("train", "--resume", str(run), f"total_timesteps={step + 3}", "scaling.num_workers=0", cwd=folder)
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, step + 4))  # each once, none missing
    return process.returncode


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_a_checkpoint_to_go_on_from(
    number: int, code: int, pendulum_data: Path, tmp_path: Path
) -> None:
    assert stop_and_resume(number, pendulum_data, tmp_path, num_workers=0) == code


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.nightly)]
)
def test_a_signal_on_ray_leaves_a_checkpoint_and_no_process(
    number: int, code: int, pendulum_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STOPPED_RUN", tmp_path.name)
    assert stop_and_resume(number, pendulum_data, tmp_path, num_workers=2) == code
    wait_until(lambda: not processes_of("", mark=f"STOPPED_RUN={tmp_path.name}"), what="processes are left")


def has_gone_on(run: RunFolder, step: int, process: subprocess.Popen[str]) -> bool:
    """Whether there is a checkpoint after that update, or there will be none."""
    return max(run.checkpoint_steps(), default=0) > step or process.poll() is not None


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("kills", [False, pytest.param(True, marks=pytest.mark.nightly)])
def test_a_sweep_that_is_stopped_or_killed_goes_on(kills: bool, pendulum_data: Path, tmp_path: Path) -> None:
    """SIGTERM, or `kill -9` after that, then to the end: what has ended is not run again, the rest loses nothing.

    The commands that are ended start Ray themselves, and the last one joins the cluster of the tests.
    """
    settings = [
        *tiny_overrides(pendulum_data, tmp_path),
        "total_timesteps=1500",
        "evaluation.every=0",
        "checkpoint.every=50",
    ]
    command = [sys.executable, "-m", "dt_ray.sweep"]
    swept = ["scaling.num_workers=1", "scaling.cpus_per_worker=1", "model.context_length={grid: [4, 2]}"]
    swept += ["max_concurrent=1"]
    run = RunFolder(Folder.at(tmp_path / "runs/tiny/trials/00000"))
    stopped = ([*settings, *swept], signal.SIGTERM, 143)
    killed = (["--resume", str(tmp_path / "runs/tiny")], signal.SIGKILL, -signal.SIGKILL)
    for arguments, number, code in (stopped, killed) if kills else (stopped,):
        known = max(run.checkpoint_steps(), default=0)
        process = subprocess.Popen([*command, *arguments], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
        wait_until(partial(has_gone_on, run, known, process))
        process.send_signal(number)
        _, errors = process.communicate(timeout=WAIT_S)
        assert process.returncode == code
        assert ("--resume" in errors) == (number == signal.SIGTERM)
        assert "Traceback" not in errors
    succeed("sweep", "--resume", str(tmp_path / "runs/tiny"), cwd=tmp_path)
    best = json.loads((tmp_path / "runs/tiny/best.json").read_text())
    assert best["updates"] == 1500
    alone = tmp_path / "alone.yaml"
    alone.write_text((tmp_path / "runs/tiny/trials/00000/config.yaml").read_text())
    succeed("train", "--config", str(alone), "name=alone", "scaling.num_workers=0", cwd=tmp_path)
    losses = [
        losses_of(RunFolder(Folder.at(folder)))
        for folder in (tmp_path / "runs/tiny/trials/alone", tmp_path / "runs/tiny/trials/00000")
    ]
    assert losses[0] == losses[1]


def test_print_config_prints_what_a_run_would_have(tmp_path: Path) -> None:
    out = succeed("train", "--config", "decision_transformer/pendulum", "--print-config", "seed=7", cwd=tmp_path)
    (tmp_path / "mine.yaml").write_text(out)
    assert succeed("train", "--config", "mine.yaml", "--print-config", cwd=tmp_path) == out
    assert "seed: 7" in out


@pytest.mark.parametrize("module", ["train", "evaluate", "sweep", "report", "export", "serve", "data"])
def test_help_imports_nothing_heavy(module: str, tmp_path: Path) -> None:
    """Torch and Ray take seconds to import; a help text needs neither."""
    heavy = "{'torch', 'ray', 'gymnasium', 'numpy', 'pyarrow', 'pydantic'}"
    code = (
        f"import sys, runpy\nsys.argv = ['x', '--help']\n"
        f"try: runpy.run_module('dt_ray.{module}', run_name='__main__')\n"
        f"except SystemExit: pass\nprint(sorted({heavy} & set(sys.modules)))"
    )
    process = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    expected = "['gymnasium', 'numpy', 'pyarrow']" if module == "data" else "[]"
    assert process.stdout.splitlines()[-1] == expected


def test_models_work_where_ray_cannot_be_imported(tmp_path: Path) -> None:
    modules = "dt_ray, dt_ray.models, dt_ray.training.loop, dt_ray.data"
    code = f"import sys; sys.modules['ray'] = None; import {modules}; print('ok')"
    process = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert process.stdout == "ok\n", process.stderr


def test_the_progress_says_when_updates_are_made_again(
    tiny_config: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunFolder.of(tiny_config)
    watcher, log = Watcher(tiny_config), MetricsLog(run.metrics_file, resumed_at=0)
    for step in (5, 10):
        log.write(step, {"train/loss": 1.0, "time/updates_per_s": 10.0, "time/workers": 2})
        watcher.look()
    MetricsLog(run.metrics_file, resumed_at=5)  # what a worker does that is started again
    watcher.look()
    assert "after update 10, resumed from a checkpoint at update 5 with 2 worker(s)" in capsys.readouterr().err

"""What of a run is kept, read and believed: complete checkpoints, each file once, and no failure that is past."""

import json
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.reports import make_report
from support.sweeps import made_sweep

from dt_ray.cli.progress import SweepWatcher, Watcher
from dt_ray.config.loading import decode_config, to_plain
from dt_ray.config.schema import RunConfig
from dt_ray.jobs.sweep import write_results
from dt_ray.jobs.training import resume_run, resumed_config, start_run
from dt_ray.runs.checkpoint import FILES, FileFacts, checkpoint_fault, write_checkpoint
from dt_ray.runs.folder import RunFolder
from dt_ray.runs.metrics import MetricsTail
from dt_ray.runs.storage import Folder
from dt_ray.sweeps.folder import result_of
from dt_ray.sweeps.tables import read_rows
from dt_ray.training import trackers


def save(run: RunFolder, step: int) -> None:
    write_checkpoint(run.checkpoint(step), {name: f"{name} at {step}".encode() for name in FILES})
    run.mark_latest(step)


def damage(run: RunFolder, step: int, *, how: str) -> None:
    checkpoint = run.checkpoint(step)
    if how == "cut":
        (checkpoint / FILES[0]).write_text("cut")
    elif how == "turned":  # a byte of the same length
        content = (checkpoint / FILES[2]).read_bytes()
        (checkpoint / FILES[2]).write_bytes(bytes([content[0] ^ 1]) + content[1:])
    else:
        (checkpoint / "MANIFEST.json").delete()


def sound_steps(run: RunFolder) -> list[int]:
    return [step for step in run.checkpoint_steps() if checkpoint_fault(run.checkpoint(step)) is None]


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    keep=st.integers(1, 3),
    actions=st.lists(st.one_of(st.none(), st.tuples(st.integers(0, 9), st.sampled_from(["cut", "turned", "half"])))),
    is_fresh=st.booleans(),
)
def test_the_newest_complete_checkpoints_stay_whatever_is_damaged(
    tmp_path_factory: pytest.TempPathFactory, keep: int, actions: list[Any], is_fresh: bool
) -> None:
    run = RunFolder(Folder.at(tmp_path_factory.mktemp("run")))
    step = 0
    for action in actions:
        if action is None:
            before = sound_steps(run)
            step += 5
            save(run, step)
            (RunFolder(run.folder) if is_fresh else run).prune_checkpoints(keep=keep, spared={step})
            expected = sorted({*before, step})[-keep:]
            assert sound_steps(run) == expected
        elif steps := sound_steps(run):
            damage(run, steps[action[0] % len(steps)], how=action[1])


def test_damaged_newer_checkpoints_do_not_push_out_the_one_to_resume_from(tmp_path: Path) -> None:
    run = RunFolder(Folder.at(tmp_path))
    for step in (10, 20, 30):
        save(run, step)
    damage(run, 20, how="cut")
    damage(run, 30, how="half")
    save(run, 15)  # the first one after going on from update 10
    run.prune_checkpoints(keep=2, spared={10, 15})
    assert sound_steps(run) == [10, 15]


def test_a_resumed_run_keeps_what_it_went_on_from_until_it_ends(tiny_config: RunConfig) -> None:
    start_run(replace(tiny_config, total_timesteps=10))
    run = RunFolder.of(tiny_config)
    for step in (5, 10):
        (run.checkpoint(step) / FILES[0]).write_text("cut") if step == 10 else None
    config = resumed_config(str(run), ["total_timesteps=15", "checkpoint.keep=1"])
    resume_run(config)
    assert {5, 15} <= set(sound_steps(run))


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each file was read, and how many bytes of it."""
    counts: Counter[str] = Counter()
    for name in ("read_bytes", "read_from"):
        plain = getattr(Folder, name)

        def counted(folder: Folder, *arguments: Any, plain=plain) -> bytes:
            content = plain(folder, *arguments)
            counts[folder.uri] += 1
            counts["bytes of " + folder.name] += len(content)
            return content

        monkeypatch.setattr(Folder, name, counted)
    return counts


def test_what_a_run_has_written_itself_is_not_read_again(tiny_config: RunConfig, reads: Counter[str]) -> None:
    evaluation = replace(tiny_config.evaluation, every=1, num_episodes=1, max_timesteps=2)
    checkpoint = replace(tiny_config.checkpoint, every=1)
    start_run(replace(tiny_config, total_timesteps=40, evaluation=evaluation, checkpoint=checkpoint))
    assert not [file for file in reads if "/evaluations/" in file]
    of_checkpoints = [count for file, count in reads.items() if "/checkpoints/step" in file]
    assert max(of_checkpoints) <= 1


def test_an_evaluation_that_is_written_again_is_read_again(tmp_path: Path) -> None:
    run = RunFolder(Folder.at(tmp_path))
    for value in (1.0, 2.0, 33.0):
        run.write_evaluation(make_report(1, value))
        assert run.read_evaluations() == [make_report(1, value)]
    RunFolder(run.folder).write_evaluation(make_report(1, 4.0, 5.0))
    assert run.read_evaluations() == [make_report(1, 4.0, 5.0)]


def test_an_evaluation_of_another_process_is_read_once(tmp_path: Path, reads: Counter[str]) -> None:
    run = RunFolder(Folder.at(tmp_path))
    for step in (1, 2, 3):
        RunFolder(run.folder).write_evaluation(make_report(step, -step))
        assert run.read_evaluations()[-1] == make_report(step, -step)
        best = run.best_evaluation()
        assert best is not None
        assert best.step == 1
    assert {count for file, count in reads.items() if "/evaluations/" in file} == {1}


def test_the_progress_reads_each_line_once(tiny_config: RunConfig, reads: Counter[str]) -> None:
    run = RunFolder.of(tiny_config)
    watcher = Watcher(tiny_config)
    Path(run.folder.uri).mkdir(parents=True)
    line = {"train/loss": 1.0, "time/updates_per_s": 1.0}
    for step in range(1, 201):
        run.metrics_file.append_text(json.dumps({"step": step, **line}) + "\n")
        watcher.look()
        assert watcher.shown_step == step
    size = len(run.metrics_file.read_bytes())
    assert reads["bytes of metrics.jsonl"] < 4 * size  # and not 100 times it


def test_a_live_bar_goes_back_where_updates_are_made_again(
    tiny_config: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    watcher = Watcher(tiny_config)
    watcher.is_live = True
    watcher.run.write_evaluation(make_report(5, -150.0))
    for step, loss in ((5, 0.25), (10, 0.5), (15, 1.0), (10, 2.0)):
        line = {"step": step, "train/loss": loss, "time/updates_per_s": 40.0, "time/workers": 1}
        watcher.run.metrics_file.append_text(json.dumps(line) + "\n")
        watcher.look()
    assert watcher.bar is not None
    assert watcher.bar.tasks[0].completed == 10
    assert watcher.bar.tasks[0].fields["text"] == "40.0 updates/s  loss 2.0000  return -150.0 at 5"
    watcher.bar.stop()
    said = capsys.readouterr().err.splitlines()
    assert said[:2] == [
        "evaluation at update 5: -100 → -150.0",
        "after update 15, resumed from a checkpoint at update 10 with 1 worker(s)",
    ]
    assert said[2].startswith("update 10/20 ")


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.one_of(st.integers(1, 3), st.just("half"), st.just("resume"), st.just("look")), max_size=20))
def test_a_tail_gives_each_line_of_a_run_that_only_grows_once(
    tmp_path_factory: pytest.TempPathFactory, actions: list[Any]
) -> None:
    file = Folder.at(tmp_path_factory.mktemp("tail")) / "metrics.jsonl"
    tail, lines, seen, pending = MetricsTail(file), [], [], ""
    for action in [*actions, "look"]:
        if action == "look":
            if new := tail.new_lines():
                seen = seen + new if seen + new == lines else new  # all of them after a resume
        elif action == "half":
            pending = '{"step'
            file.write_text("".join(json.dumps(line) + "\n" for line in lines) + pending)
        elif action == "resume":
            lines = lines[: len(lines) // 2]
            file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        else:
            lines = [*lines, *({"step": len(lines) + i, "loss": action} for i in range(action))]
            file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert not lines or seen[-1] == lines[-1]
    assert tail.new_lines() == []


def test_a_table_of_a_sweep_reads_what_has_changed(tiny_config: RunConfig, tmp_path: Path, reads: Counter[str]) -> None:
    sweep, folder = made_sweep(tiny_config, tmp_path, optim__learning_rate={"grid": [1e-3]})
    for name in folder.trial_names():
        (folder.trial(name).folder / "summary.json").delete()  # they are under way
    watcher = SweepWatcher(sweep)
    watcher.look()
    before = sum(count for file, count in reads.items() if file.startswith("/"))
    for _ in range(10):
        watcher.look()
    assert sum(count for file, count in reads.items() if file.startswith("/")) == before
    (folder.trial("00000").folder / "error.txt").write_text("lost\n")
    watcher.look()
    assert watcher.rows["00000"][1] == "failed"


def test_a_failure_that_is_past_is_forgotten(tiny_config: RunConfig) -> None:
    start_run(replace(tiny_config, total_timesteps=10))
    run = RunFolder.of(tiny_config)
    (run.folder / "error.txt").write_text("the process was lost\n")
    assert result_of(run)[0] == "failed"
    resume_run(resumed_config(str(run), ["total_timesteps=15"]))
    assert result_of(run)[0] == "finished"


def test_a_damaged_checkpoint_and_a_trial_without_a_start_leave_a_table(
    tiny_config: RunConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sweep, folder = made_sweep(tiny_config, tmp_path, optim__learning_rate={"grid": [1e-4, 1e-2]})
    best = write_results(sweep, folder)
    assert best is not None
    (Folder.at(best["checkpoint"]) / FILES[0]).write_text("cut")
    (folder.trials / "00009/error.txt").write_text("no data\n")
    other = write_results(sweep, folder)
    assert other is not None
    assert other["trial"] != best["trial"]
    assert "damaged" in caplog.text
    assert {"trial": "00009", "status": "failed"} in read_rows(sweep, folder)
    assert (folder.folder / "trials.csv").exists()


class BrokenTracker:
    """A tracking server that goes away."""

    def __init__(self, config: RunConfig, run: RunFolder, *, step: int, fails_at: str = "") -> None:
        self.fails_at, self.num_calls = fails_at, 0
        self._fail("start")

    def log(self, step: int, values: Any) -> None:
        self.num_calls += 1
        self._fail("log" if self.num_calls > 2 else "")

    def close(self) -> None:
        self._fail("close")

    def _fail(self, place: str) -> None:
        if place == self.fails_at:
            raise ConnectionError("connection lost\nand more of it")


@pytest.mark.parametrize("fails_at", ["start", "log", "close"])
def test_a_tracker_that_is_gone_is_one_warning(
    tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fails_at: str
) -> None:
    def broken(*arguments: Any, **options: Any) -> BrokenTracker:
        return BrokenTracker(*arguments, **options, fails_at=fails_at)

    monkeypatch.setitem(trackers.TRACKERS, "tensorboard", broken)
    logged = replace(tiny_config.logging, trackers=("tensorboard",))
    assert start_run(replace(tiny_config, logging=logged)).summary["status"] == "finished"
    warnings = [each.getMessage() for each in caplog.records if each.getMessage().startswith("the tracker")]
    assert warnings == ["the tracker tensorboard failed, and the run goes on without it: connection lost"]


def test_a_checkpoint_of_a_gpu_is_read_without_one(
    tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its tensors are marked as a GPU's, which this PyTorch has no way to put them on."""
    config = replace(decode_config(to_plain(tiny_config) | {"algorithm": "iql", "total_timesteps": 10}))
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:3")
        start_run(config)
    run = RunFolder.of(config)
    optimizer = Path(f"{run.checkpoint(10)}/training/optimizer.pt")
    assert b"cuda:3" in optimizer.read_bytes()
    from dt_ray.training.relabeling import LearnedValues

    assert resume_run(resumed_config(str(run), ["total_timesteps=15"])).summary["step"] == 15
    state = run.checkpoint(15) / FILES[3]
    content = state.read_text().replace('"compile": false', '"compile": true').replace('"float32"', '"bfloat16"')
    state.write_text(content)
    manifest = json.loads((run.checkpoint(15) / "MANIFEST.json").read_text())
    manifest[FILES[3]] = asdict(FileFacts.of(content.encode()))
    (run.checkpoint(15) / "MANIFEST.json").write_text(json.dumps(manifest))
    monkeypatch.setenv("CXX", "no-such-compiler")  # that the machine with the GPU had
    observations = np.zeros((2, 3), np.float32)
    assert np.isfinite(LearnedValues(str(run.checkpoint(15)))(observations)).all()

"""Runs whose storage is an object store, and one that doesn't answer for a while."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pyarrow import fs
from support.object_store import PLANTED, ObjectStore
from support.processes import wait_until

from dt_ray.config.schema import RunConfig
from dt_ray.data import filesystems
from dt_ray.errors import StorageError
from dt_ray.jobs.training import resume_run, resumed_config, start_run
from dt_ray.learners.decision_transformer import DecisionTransformerLearner
from dt_ray.models.batch import WindowBatch
from dt_ray.runs.checkpoint import checkpoint_fault
from dt_ray.runs.evaluation_report import TargetResult
from dt_ray.runs.folder import RunFolder
from dt_ray.runs.metrics import MetricsLog
from dt_ray.runs.storage import Folder


@pytest.fixture
def bucket(object_store: ObjectStore, tmp_path: Path) -> Iterator[Folder]:
    """A folder of its own for each test."""
    yield Folder.at(f"s3://bucket/{tmp_path.name}")
    object_store.mend()


@pytest.fixture
def impatient(bucket: Folder, monkeypatch: pytest.MonkeyPatch) -> Iterator[Folder]:
    """The bucket, where a first failure is the last."""
    monkeypatch.setattr(filesystems, "S3_ATTEMPTS", 1)
    filesystems._filesystem.cache_clear()
    yield bucket
    filesystems._filesystem.cache_clear()


def numbers_of(config: RunConfig) -> tuple[list[float], list[tuple[TargetResult, ...]], bytes]:
    """What a run comes to: its losses, its evaluations and its last weights."""
    run = RunFolder.of(config)
    losses = [json.loads(line)["train/loss"] for line in run.metrics_file.read_text().splitlines()]
    evaluations = [report.targets for report in run.read_evaluations()]
    return losses, evaluations, (run.checkpoint(20) / "policy/model.safetensors").read_bytes()


@pytest.mark.parametrize("kind", ["disk", "object store"])
def test_a_folder_is_what_was_written_into_it(kind: str, bucket: Folder, tmp_path: Path) -> None:
    folder = bucket if kind == "object store" else Folder.at(tmp_path)
    place = folder / "a"
    assert not place.exists()
    assert place.names() == []
    place.delete()
    with pytest.raises(FileNotFoundError):
        (place / "one").read_bytes()
    for name, content in {"one": b"1", "two": b"2" * 6_000_000, "deep/three": b""}.items():
        (place / name).write_bytes(content)
        assert (place / name).read_bytes() == content
    (place / "one").write_text("again")
    assert (place / "one").read_text() == "again"
    assert place.names() == ["deep", "one", "two"]
    place.delete()
    assert not place.exists()


def test_credentials_and_settings_stay_out_of_the_uri() -> None:
    for uri in ("s3://key:secret@bucket/runs", "s3://bucket/runs?endpoint_override=localhost"):
        with pytest.raises(StorageError, match="set AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID") as error:
            Folder.at(uri).exists()
        assert "secret" not in str(error.value)


def test_a_run_is_the_same_in_an_object_store(tiny_config: RunConfig, bucket: Folder, pendulum_data: Path) -> None:
    """Data, run and resume, with nothing on the local disk."""
    fs.copy_files(str(pendulum_data), f"{bucket}/data")
    there = replace(tiny_config, storage_path=str(bucket), data=replace(tiny_config.data, path=f"{bucket}/data"))
    half = replace(there, total_timesteps=10, optim=replace(there.optim, schedule="constant"))
    start_run(half)
    result = resume_run(resumed_config(f"{bucket}/tiny", ["total_timesteps=20"]))
    start_run(replace(tiny_config, optim=half.optim))
    assert result.summary["status"] == "finished"
    assert numbers_of(half) == numbers_of(tiny_config)
    assert RunFolder.of(half).checkpoint_steps() == RunFolder.of(tiny_config).checkpoint_steps()
    filesystem = fs.FileSystem.from_uri("s3://bucket")[0]
    files = filesystem.get_file_info(fs.FileSelector(f"bucket/{bucket.name}/tiny", recursive=True))
    contents = [filesystem.open_input_stream(file.path).read() for file in files if file.is_file]
    assert not any(secret.encode() in content for secret in PLANTED for content in contents)


@pytest.mark.parametrize("how", ["500", "drop"])
def test_a_store_that_fails_for_a_while_changes_nothing(
    how, tiny_config: RunConfig, bucket: Folder, object_store: ObjectStore
) -> None:
    there = replace(tiny_config, storage_path=str(bucket))
    RunFolder.of(there).create(there)
    object_store.fail(how, num_requests=2)
    start_run(there, overwrite=True)
    assert object_store.answers
    start_run(tiny_config)
    assert numbers_of(there) == numbers_of(tiny_config)


def test_a_store_that_is_gone_is_not_taken_for_a_damaged_checkpoint(
    tiny_config: RunConfig, impatient: Folder, object_store: ObjectStore
) -> None:
    """Else a worker that is started again would begin from nothing, and throw the metrics away."""
    there = replace(tiny_config, storage_path=str(impatient))
    start_run(there)
    run = RunFolder.of(there)
    for ask in (run.latest_checkpoint, lambda: checkpoint_fault(run.checkpoint(20)), lambda: resumed_config(str(run))):
        object_store.fail("500")
        with pytest.raises(StorageError, match="can't (read|reach) s3://bucket/"):
            ask()
        object_store.mend()
    assert run.latest_checkpoint()[0] == run.checkpoint(20)


def test_a_store_that_is_gone_is_not_taken_for_corrupt_data(
    tiny_config: RunConfig, impatient: Folder, object_store: ObjectStore, pendulum_data: Path, monkeypatch
) -> None:
    from dt_ray.data.logs import files, reading

    fs.copy_files(str(pendulum_data), f"{impatient}/data")
    settings = replace(tiny_config.data, path=f"{impatient}/data", on_corrupt="skip")
    (file, *_) = files.find_files(settings.path)
    object_store.fail("500")
    with pytest.raises(StorageError, match="can't read bucket/"):
        reading.fault_in_file(file, settings, None)


def test_a_run_ends_when_its_store_is_gone_for_good_and_goes_on_when_it_is_back(
    tiny_config: RunConfig, impatient: Folder, object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    start_run(tiny_config)
    there = replace(tiny_config, storage_path=str(impatient))
    mark = RunFolder.mark_latest

    def then_fail(run: RunFolder, step: int) -> None:
        mark(run, step)
        if step == 10:
            object_store.fail("drop")

    monkeypatch.setattr(RunFolder, "mark_latest", then_fail)
    with pytest.raises(StorageError, match="can't .* s3://bucket/"):
        start_run(there)
    object_store.mend()
    resume_run(resumed_config(f"{impatient}/tiny"))
    assert numbers_of(there) == numbers_of(tiny_config)


def test_an_object_store_gets_the_metrics_now_and_then_and_all_of_them_in_the_end(bucket: Folder) -> None:
    file = bucket / "metrics.jsonl"
    log = MetricsLog(file, resumed_at=0)
    for step in (5, 10, 15):
        log.write(step, {"train/loss": 1.0})
    assert file.read_text() == ""
    log.flush()
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [5, 10, 15]
    MetricsLog(file, resumed_at=10)
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [5, 10]


def test_training_does_not_wait_for_a_store_that_is_slow(
    tiny_config: RunConfig, bucket: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dt_ray.training import recorder as recording

    write, taken = recording.write_checkpoint, []
    update, updated = DecisionTransformerLearner.update, []

    def count(learner: DecisionTransformerLearner, batch: WindowBatch, **options: Any) -> Any:
        updated.append(learner.step)
        return update(learner, batch, **options)

    def slowly(folder: Folder, files: dict[str, bytes]) -> None:
        num = min(len(updated) + 50, 200 if len(updated) <= 200 else 400)
        wait_until(lambda: len(updated) >= num, what=f"the training waits at update {len(updated)} for {folder}")
        write(folder, files)
        taken.append(folder.name)

    monkeypatch.setattr(DecisionTransformerLearner, "update", count)
    monkeypatch.setattr(recording, "write_checkpoint", slowly)
    there = replace(
        tiny_config,
        storage_path=str(bucket),
        total_timesteps=400,
        checkpoint=replace(tiny_config.checkpoint, every=1),
        evaluation=replace(tiny_config.evaluation, every=200),
    )
    start_run(there)
    assert len(taken) < 20
    assert {"step-00000200", "step-00000400"} <= set(taken)  # an evaluation waits for the one, a resume for the other

"""Facts about streamed files are gathered once: a start reads a file for them only if it is new or has changed."""

import os
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from support.examples import make_episodes, write_episodes
from support.object_store import ObjectStore
from support.reads import count_reads

from dt_ray.config.schema import DataConfig, RunConfig
from dt_ray.data.logs.episodes import to_table
from dt_ray.data.spaces import SpaceSpec
from dt_ray.errors import DataError
from dt_ray.jobs.training import resume_run, resumed_config, start_run
from dt_ray.runs.folder import RunFolder
from dt_ray.runs.storage import Folder
from dt_ray.training import fact_store, file_facts
from dt_ray.training.fact_store import FOLDER
from dt_ray.training.file_facts import SETTINGS_READ_LATER, SETTINGS_WITHOUT_EFFECT, FileFacts
from dt_ray.training.stream_facts import StreamingData

NUM_FILES = 4


def write(folder: Path, number: int, *, seed: int | None = None) -> None:
    data = make_episodes([9, 12, 7, 5, 8], seed=number if seed is None else seed)
    path = write_episodes(replace(data, episode_ids=data.episode_ids + 5 * number), folder / f"{number}.parquet")
    age(path)


def age(path: Path) -> None:
    """Makes it look as if the file had last changed some time ago."""
    written = os.stat(path).st_mtime - 1000
    os.utime(path, (written, written))


@pytest.fixture
def config(tiny_config: RunConfig, tmp_path: Path) -> RunConfig:
    for number in range(NUM_FILES):
        write(tmp_path / "log", number)
    settings = replace(tiny_config.data, path=str(tmp_path / "log"), residency="streaming", memory_mb=1)
    return replace(tiny_config, data=settings)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each file was read whole for the facts of its episodes."""
    return count_reads(file_facts, monkeypatch)


def build(config: RunConfig, spec: SpaceSpec) -> StreamingData:
    facts = FileFacts(config, spec)
    files, num_skipped = facts.sound_files()
    return StreamingData.build(files, facts, num_skipped_files=num_skipped)


def assert_same(one: StreamingData, other: StreamingData) -> None:
    np.testing.assert_array_equal(one.train_ids, other.train_ids)
    assert [file.path for file in one.files] == [file.path for file in other.files]
    assert (one.num_transitions, one.notes, one.spec) == (other.num_transitions, other.notes, other.spec)
    assert one.num_skipped_files == other.num_skipped_files
    for name, value in vars(one.normalizer).items():
        np.testing.assert_array_equal(value, getattr(other.normalizer, name))
    assert one.validation is not None
    assert other.validation is not None
    for part, again in zip(one.validation.parts, other.validation.parts, strict=True):
        np.testing.assert_array_equal(part, again)


@pytest.mark.parametrize("changes", [{}, {"discount": 0.9}, {"on_corrupt": "skip"}])
def test_a_second_start_reads_no_file_for_facts_and_knows_the_same(
    config: RunConfig, pendulum_spec: SpaceSpec, reads: Counter[str], changes: dict[str, Any]
) -> None:
    config = replace(config, data=replace(config.data, **changes))
    first = build(config, pendulum_spec)
    assert reads == {f"{number}.parquet": 1 for number in range(NUM_FILES)}
    again = build(replace(config, name="another"), pendulum_spec)
    assert reads.total() == NUM_FILES
    assert_same(again, first)


def test_only_new_and_changed_files_are_read_again(
    config: RunConfig, pendulum_spec: SpaceSpec, tmp_path: Path, reads: Counter[str]
) -> None:
    build(config, pendulum_spec)
    reads.clear()
    write(tmp_path / "log", 1, seed=77)
    write_episodes(make_episodes([6, 4]), tmp_path / "log" / "0a.parquet")
    age(tmp_path / "log" / "0a.parquet")
    found = build(config, pendulum_spec)
    assert reads == {"0a.parquet": 1, "1.parquet": 1}
    fresh = build(replace(config, storage_path=f"{tmp_path}/other"), pendulum_spec)
    assert_same(found, fresh)
    (tmp_path / "log" / "2.parquet").unlink()
    reads.clear()
    assert_same(build(config, pendulum_spec), build(replace(config, storage_path=f"{tmp_path}/third"), pendulum_spec))
    assert reads.total() == NUM_FILES  # all of them by the one that knows nothing


def test_a_file_that_has_just_changed_may_change_again_and_is_not_remembered(
    config: RunConfig, pendulum_spec: SpaceSpec, tmp_path: Path, reads: Counter[str]
) -> None:
    os.utime(tmp_path / "log" / "3.parquet")
    build(config, pendulum_spec)
    reads.clear()
    build(config, pendulum_spec)
    assert reads == {"3.parquet": 1}


def test_ids_that_repeat_in_a_file_are_the_same_at_every_start(
    config: RunConfig, pendulum_spec: SpaceSpec, tmp_path: Path
) -> None:
    data = make_episodes([3, 4, 5])
    table = to_table(replace(data, episode_ids=np.array([7, 7, 8])))
    pq.write_table(table, tmp_path / "log" / "2.parquet")
    age(tmp_path / "log" / "2.parquet")
    first = build(config, pendulum_spec)
    assert_same(build(config, pendulum_spec), first)
    assert first.train_ids.max() >> 32 == NUM_FILES - 1


OTHER_VALUES: dict[str, Any] = {
    "path": "elsewhere", "mix": {"a": 1.0}, "format": "parquet", "out_of_bounds": "clip", "columns": {"reward": "r"},
    "episodes_across_files": False, "episode_per_file": True, "time_limit": 7, "action_scale": 2.0, "discount": 0.5,
    "return_source": "rewards",
}  # fmt: skip


def test_every_setting_that_changes_facts_asks_for_new_ones(config: RunConfig, pendulum_spec: SpaceSpec) -> None:
    def place(config: RunConfig, spec: SpaceSpec = pendulum_spec) -> str:
        return str(FileFacts(config, spec)._episodes.place)

    known = {*OTHER_VALUES, *SETTINGS_READ_LATER, *SETTINGS_WITHOUT_EFFECT}
    assert {field.name for field in fields(DataConfig)} <= known  # a new setting counts, unless it is named there
    places = {place(replace(config, data=replace(config.data, **{name: new}))) for name, new in OTHER_VALUES.items()}
    places |= {place(config), place(config, pendulum_spec.with_bounds((-1.0,), (1.0,)))}
    assert len(places) == len(OTHER_VALUES) + 2
    model, data = replace(config.model, width=32), replace(config.data, memory_mb=9, top_fraction=0.5, balance=0.5)
    assert place(replace(config, name="other", seed=3, model=model, data=data)) == place(config)


def test_a_faulty_file_is_read_once_a_start_and_the_others_never_again(
    config: RunConfig, pendulum_spec: SpaceSpec, tmp_path: Path, reads: Counter[str]
) -> None:
    (tmp_path / "log" / "1.parquet").write_bytes(b"none")
    age(tmp_path / "log" / "1.parquet")
    config = replace(config, data=replace(config.data, on_corrupt="skip"))
    first = build(config, pendulum_spec)
    assert first.num_skipped_files == 1
    assert reads == {f"{number}.parquet": 1 for number in range(NUM_FILES)}
    assert_same(build(config, pendulum_spec), first)
    assert reads == {f"{number}.parquet": 1 + (number == 1) for number in range(NUM_FILES)}


def test_longer_episodes_than_the_model_takes_are_refused_at_every_start(
    config: RunConfig, pendulum_spec: SpaceSpec
) -> None:
    build(config, pendulum_spec)
    short = replace(config, model=replace(config.model, max_timesteps=11))
    with pytest.raises(DataError, match=r"episode \d+ has 12 steps but the timestep table has model.max_timesteps=11"):
        build(short, pendulum_spec)


@pytest.mark.parametrize("damage", [lambda content: content[:-20], lambda content: b"", lambda content: b"x" * 99,
                                    lambda content: content[:200] + b"\x00\x01" + content[202:]])  # fmt: skip
def test_damaged_facts_are_gathered_anew(
    config: RunConfig, pendulum_spec: SpaceSpec, reads: Counter[str], damage: Callable[[bytes], bytes]
) -> None:
    first = build(config, pendulum_spec)
    (file,) = (Path(config.storage_path) / FOLDER).iterdir()
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    assert_same(build(config, pendulum_spec), first)
    assert reads.total() == 2 * NUM_FILES
    assert file.read_bytes() == whole


def test_storage_that_can_not_be_written_costs_a_warning(
    config: RunConfig, pendulum_spec: SpaceSpec, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("no folder")
    build(replace(config, storage_path=str(tmp_path / "file")), pendulum_spec)
    assert "facts about the dataset's files are not kept, the next start reads all again: can't write" in caplog.text


def test_a_run_and_its_resume_use_what_is_known(config: RunConfig, reads: Counter[str]) -> None:
    start_run(config)
    assert reads.total() == NUM_FILES
    resume_run(resumed_config(str(RunFolder.of(config)), ["total_timesteps=30"]))
    assert reads.total() == NUM_FILES


def test_a_dataset_and_facts_on_an_object_store_are_used_alike(
    config: RunConfig,
    pendulum_spec: SpaceSpec,
    reads: Counter[str],
    object_store: ObjectStore,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fact_store, "RECENT_NS", 0)
    there = Folder.at("s3://bucket/facts-of-files")
    for file in Path(config.data.path).iterdir():
        (there / "log" / file.name).write_bytes(file.read_bytes())
    remote = replace(config, storage_path=str(there), data=replace(config.data, path=str(there / "log")))
    time.sleep(1.1)  # such a store's times are whole seconds
    first = build(remote, pendulum_spec)
    assert_same(build(remote, pendulum_spec), first)
    assert reads.total() == NUM_FILES
    assert [name.endswith(".parquet") for name in (there / FOLDER).names()] == [True]

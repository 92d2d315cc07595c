"""A log that is read to derive settings is not read again to train on, and what is trained is the same."""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from support.datasets import write_flat
from support.examples import losses_of, make_episodes, write_episodes
from support.reads import count_reads

from dt_ray.config.loading import read_settings
from dt_ray.data.logs import datasets, reading
from dt_ray.errors import DataError
from dt_ray.jobs.deriving import ResolvedSettings, resolve_settings
from dt_ray.jobs.training import name_run, start_run
from dt_ray.runs.folder import RunFolder
from dt_ray.runs.storage import Folder
from dt_ray.training import file_facts

SMALL = ["total_timesteps=6", "logging.every=1", "model.width=16", "scaling.num_workers=0", "evaluation.num_episodes=1"]


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each file's episodes were read, by its name."""
    return count_reads(reading, monkeypatch)


def settings(log: Path, storage: Path, *overrides: str) -> ResolvedSettings:
    return resolve_settings(read_settings(None, [f"data.path={log}", f"storage_path={storage}", *SMALL, *overrides]))


def train(found: ResolvedSettings, name: str, *, again: bool = False) -> Sequence[float]:
    result = start_run(name_run(found.config, name), overwrite=True, read=None if again else found.read)
    return losses_of(RunFolder(Folder.at(result.run)))


@pytest.mark.parametrize("form", ["a file for some episodes", "episodes across files"])
def test_each_file_is_read_once_and_trains_the_same(form: str, tmp_path: Path, reads: Counter[str]) -> None:
    data, log = make_episodes([9, 12, 7, 8, 11, 10]), tmp_path / "log"
    if form == "episodes across files":
        write_flat(data, log, num_files=4)
    else:
        for number in range(3):
            write_episodes(data.select([2 * number, 2 * number + 1]), log / f"{number:03d}.parquet")
    found = settings(log, tmp_path)
    losses = train(found, "one")
    assert set(reads.values()) == {1}, reads
    assert found.read is not None
    assert not found.read.parts, "none is kept while the run trains"
    assert train(found, "again", again=True) == losses
    assert set(reads.values()) == {2}


def test_what_an_environment_bounds_is_clipped_or_refused_as_ever(tmp_path: Path, reads: Counter[str]) -> None:
    data = make_episodes([9, 12, 7])
    data.actions[5] = 3.5
    log = write_episodes(data, tmp_path / "log.parquet")
    clipped = settings(log, tmp_path, "env_id=Pendulum-v1", "data.out_of_bounds=clip")
    losses = train(clipped, "clipped")
    assert reads["log.parquet"] == 1
    assert train(clipped, "again", again=True) == losses
    refused = settings(log, tmp_path, "env_id=Pendulum-v1")
    with pytest.raises(DataError, match=r"log.parquet can't be trained on.*\n  episode 0, step 5: action"):
        train(refused, "refused")
    assert refused.read is not None
    assert not refused.read.parts


def test_a_file_that_is_left_out_is_counted(tmp_path: Path) -> None:
    for number in range(3):
        write_episodes(make_episodes([9, 12]), tmp_path / "log" / f"{number}.parquet")
    (tmp_path / "log" / "1.parquet").write_bytes(b"none")
    found = settings(tmp_path / "log", tmp_path, "data.on_corrupt=skip")
    result = start_run(name_run(found.config, "one"), read=found.read)
    assert result.summary["skipped_files"] == 1


def test_more_than_is_kept_is_read_again(tmp_path: Path, reads: Counter[str], monkeypatch: pytest.MonkeyPatch) -> None:
    log = write_episodes(make_episodes([9, 12, 7]), tmp_path / "log.parquet")
    monkeypatch.setattr(datasets, "MAX_KEPT_BYTES", 100)
    found = settings(log, tmp_path)
    assert found.read is not None
    assert not found.read.parts
    train(found, "one")
    assert reads["log.parquet"] == 2
    streamed = settings(log, tmp_path, "data.residency=streaming")
    assert streamed.read is None
    train(streamed, "streamed")


def test_a_log_that_streams_is_looked_at_once_for_settings_like_those_of_resident_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads: Counter[str]
) -> None:
    monkeypatch.setattr(file_facts, "read_fragments", reading.read_fragments)  # which counts
    for number in range(3):
        data = make_episodes([9, 12 + number, 7], seed=number)
        path = write_episodes(
            replace(data, episode_ids=data.episode_ids + 3 * number), tmp_path / f"log/{number}.parquet"
        )
        os.utime(path, (1e9, 1e9))
    resident = settings(tmp_path / "log", tmp_path)
    reads.clear()
    for _ in range(2):
        streamed = settings(tmp_path / "log", tmp_path, "data.residency=streaming")
        assert [each.value for each in streamed.derived] == [each.value for each in resident.derived]
        assert reads == {f"{number}.parquet": 1 for number in range(3)}
    train(streamed, "one")


def test_files_of_different_dimensions_are_refused_before_anything_is_derived(tmp_path: Path) -> None:
    for number, dimension in enumerate((3, 4)):
        write_episodes(make_episodes([5, 6], observation_dim=dimension), tmp_path / f"log/{number}.parquet")
    with pytest.raises(DataError, match=r"0.parquet has \(observation, action\) dimensions \(3, 1\) but .*1.parquet"):
        settings(tmp_path / "log", tmp_path, "data.residency=streaming")


@pytest.mark.ray
def test_workers_get_what_the_driver_has_read(ray_cluster: None, tmp_path: Path, reads: Counter[str]) -> None:
    log = tmp_path / "log"
    for number in range(5):
        write_episodes(make_episodes([9, 12, 7], seed=number), log / f"{number}.parquet")
    found = settings(log, tmp_path, "scaling.num_workers=1")
    losses = train(found, "one")
    assert set(reads.values()) == {1}
    assert found.read is not None
    assert not found.read.parts
    here = settings(log, tmp_path)
    assert train(here, "here", again=True) == pytest.approx(losses, rel=1e-5)

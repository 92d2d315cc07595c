"""Large files are read by ranges of their rows: whatever the ranges, the episodes are those of files read whole."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.examples import make_episodes
from support.logs import EPISODE_WRITERS, NAMES, ROW_WRITERS, columns_of
from support.streamed import run_config

from dt_ray.config.schema import DataConfig
from dt_ray.data import TransitionDataset, read_dataset
from dt_ray.data.formats import lazy_arrays, tables
from dt_ray.data.logs import files, row_ranges
from dt_ray.data.logs.files import DatasetFile
from dt_ray.data.logs.reading import read_episodes
from dt_ray.data.logs.sources import sound_files_here
from dt_ray.errors import DataError
from dt_ray.training.file_facts import FileFacts
from dt_ray.training.stream_facts import StreamingData

FIELDS = ("observations", "actions", "rewards", "terminated", "truncated", "starts", "episode_ids", "returns_to_go")


@contextmanager
def ranges_of(num_bytes: int, *, block_bytes: int = 10**6) -> Iterator[list[int]]:
    """Every file counts as large; gives the numbers of ranges of those that are divided."""
    found: list[int] = []
    find = row_ranges.find_ranges

    def counted(file: DatasetFile, config: DataConfig) -> Any:
        ranges = find(file, config)
        found.append(len(ranges or ()))
        return ranges

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "PART_BYTES", 1)
        patch.setattr(row_ranges, "RANGE_BYTES", num_bytes)
        patch.setattr(tables, "BLOCK_BYTES", block_bytes)
        patch.setattr("dt_ray.data.logs.reading.find_ranges", counted)
        yield found


def assert_same(found: TransitionDataset, whole: TransitionDataset) -> None:
    """The same episodes; where their ids don't go up in the file, ranges may give them in another order."""
    found, whole = (data.select(np.argsort(data.episode_ids, kind="stable")) for data in (found, whole))
    for name in FIELDS:
        np.testing.assert_array_equal(getattr(found, name), getattr(whole, name), err_msg=name)
    np.testing.assert_array_equal(found.known_finals, whole.known_finals)


@st.composite
def episodes(draw: st.DrawFn) -> TransitionDataset:
    lengths = draw(st.lists(st.integers(1, 15), min_size=3, max_size=12) | st.just([1] * 9))
    data = make_episodes(lengths, observation_dim=draw(st.integers(1, 3)), seed=draw(st.integers(0, 99)))
    by_limit = np.array(draw(st.lists(st.booleans(), min_size=len(lengths), max_size=len(lengths))))
    terminated = np.zeros(data.num_transitions, bool)
    terminated[data.ends[~by_limit] - 1] = True
    return replace(data, terminated=terminated, truncated=data.truncated & ~terminated)


def next_observations_of(data: TransitionDataset, *, shows_resets: bool) -> np.ndarray:
    """After the last step of an episode comes another observation, or, as in some logs, the first of the next one."""
    after = np.roll(data.observations, -1, axis=0)
    if not shows_resets:
        after[data.ends - 1] = data.observations[data.ends - 1] + 1
    return after


def save_compressed(columns: dict[str, Any], file: Path) -> None:
    np.savez_compressed(file.with_suffix(".npz"), **{name: np.asarray(values) for name, values in columns.items()})


def write_one_observation_more(columns: dict[str, Any], file: Path) -> None:
    more = {name: np.asarray(values) for name, values in columns.items()}
    name = next(each for each in more if each.strip().casefold() in ("observation", "observations", "obs", "state"))
    more[name] = np.concatenate([more[name], more[name][-1:] + 1])
    ROW_WRITERS["hdf5"](more, file)


WRITERS: dict[str, Callable[..., Any]] = {
    **{name: ROW_WRITERS[name] for name in ("csv", "semicolon", "tab", "csv.gz", "npz", "hdf5", "pickle", "parquet")},
    "npz, compressed": save_compressed,
    "one observation more": write_one_observation_more,
}


@settings(max_examples=150)
@given(st.data(), episodes(), st.integers(1, 400), st.integers(300, 900), st.integers(1, 3))
def test_reading_by_ranges_of_any_size_is_reading_whole(
    data: st.DataObject, log: TransitionDataset, num_bytes: int, block_bytes: int, num_files: int
) -> None:
    container, naming = data.draw(st.sampled_from(sorted(WRITERS))), data.draw(st.sampled_from(sorted(NAMES)))
    ids = data.draw(st.sampled_from([None, "numbers", "texts", "floats"]))
    if data.draw(st.booleans()):  # ids in any order
        log = replace(log, episode_ids=np.random.default_rng(1).permutation(log.num_episodes) * 3)
    times = data.draw(st.sampled_from([None, "index", "seconds", "every4"])) if ids else None
    columns = columns_of(log, naming=naming, ids=ids, times=times)
    if data.draw(st.booleans()):
        columns["next_observation"] = next_observations_of(log, shows_resets=data.draw(st.booleans()))
    if data.draw(st.booleans()):
        columns["return_to_go"] = log.to_go()
    if ids and times and data.draw(st.integers(0, 3)) == 0:
        order = np.random.default_rng(0).permutation(log.num_transitions)
        columns = {name: np.asarray(values)[order] for name, values in columns.items()}
    limit = data.draw(st.none() | st.integers(1, 20))
    across = data.draw(st.sampled_from(["auto", True, False]))
    cuts = np.linspace(0, log.num_transitions, num_files + 1).astype(int)
    with tempfile.TemporaryDirectory() as folder:
        for number in range(num_files):  # which cut episodes too
            part = {name: np.asarray(values)[cuts[number] : cuts[number + 1]] for name, values in columns.items()}
            if len(part["action" if "action" in part else next(iter(part))]):
                WRITERS[container](part, Path(folder) / f"part-{number}")
        config = DataConfig(path=folder, time_limit=limit, episodes_across_files=across)
        assert_reads_alike(config, num_bytes, block_bytes)


@settings(max_examples=40)
@given(st.sampled_from(sorted(EPISODE_WRITERS)), episodes(), st.integers(1, 400), st.integers(1, 2))
def test_containers_of_episodes_are_read_alike_by_ranges(
    kind: str, log: TransitionDataset, num_bytes: int, num_files: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for number in range(num_files):
            EPISODE_WRITERS[kind](log, Path(folder) / f"part-{number}")
        if kind != "whole":  # which Parquet's row groups divide
            assert_reads_alike(DataConfig(path=folder), num_bytes, 1000)


def test_single_steps_with_one_observation_more_and_ids_that_go_down(tmp_path: Path) -> None:
    log = make_episodes([1] * 8 + [2])
    columns = columns_of(replace(log, episode_ids=np.arange(9)[::-1]), naming="d4rl", ids="numbers", times=None)
    write_one_observation_more(columns, tmp_path / "log")
    assert_reads_alike(DataConfig(path=str(tmp_path)), 1, 300)


def test_a_first_block_of_names_alone_is_no_empty_file(tmp_path: Path) -> None:
    WRITERS["csv"](columns_of(make_episodes([4, 5]), naming="d4rl", ids="numbers", times=None), tmp_path / "log")
    assert_reads_alike(DataConfig(path=str(tmp_path)), 1, len((tmp_path / "log.csv").read_text().split("\n")[0]) + 2)


def assert_reads_alike(config: DataConfig, num_bytes: int, block_bytes: int) -> None:
    whole, fault = read_or_refuse(config)
    with ranges_of(num_bytes, block_bytes=block_bytes):
        found, fault_by_ranges = read_or_refuse(config)
    assert fault_by_ranges == fault
    if found is not None and whole is not None:
        assert_same(found, whole)


def read_or_refuse(config: DataConfig) -> tuple[TransitionDataset | None, str | None]:
    try:
        return read_dataset(config), None
    except DataError as error:
        return None, str(error)


def write_groups(log: TransitionDataset, file: Path) -> None:
    EPISODE_WRITERS["groups"](log, file)


def write_d3rlpy(log: TransitionDataset, file: Path) -> None:
    with h5py.File(file.with_suffix(".h5"), "w") as content:
        content["columns"] = [b"observations", b"actions", b"rewards", b"terminated"]
        content["num_episodes"] = log.num_episodes
        for number in range(log.num_episodes):
            part = log.select([number])
            content[f"observations_{number}"], content[f"actions_{number}"] = part.observations, part.actions
            content[f"rewards_{number}"], content[f"terminated_{number}"] = part.rewards, bool(part.terminated[-1])


def write_rows(container: str) -> Callable[[TransitionDataset, Path], None]:
    def write(log: TransitionDataset, file: Path) -> None:
        columns = columns_of(log, naming="d4rl", ids=None, times=None)
        columns["next_observations"] = next_observations_of(log, shows_resets=True)
        WRITERS[container](columns, file)

    return write


def write_by_unordered_ids(log: TransitionDataset, file: Path) -> None:
    log = replace(log, episode_ids=np.arange(log.num_episodes)[::-1])
    WRITERS["csv"](columns_of(log, naming="ours", ids="texts", times="index"), file)


DIVIDED = {"unordered ids": write_by_unordered_ids, "groups": write_groups, "d3rlpy": write_d3rlpy} | {
    name: write_rows(name) for name in ("hdf5", "npz", "npz, compressed", "csv", "tab", "one observation more")
}


@pytest.mark.parametrize("kind", DIVIDED)
def test_a_large_file_is_divided_and_no_task_reads_more_than_its_range(kind: str, tmp_path: Path) -> None:
    log = make_episodes([7, 12, 3, 9, 20, 1, 1, 8])
    DIVIDED[kind](log, tmp_path / "log")
    config = DataConfig(path=str(tmp_path))
    whole = read_dataset(config)
    with ranges_of(400, block_bytes=400) as found:
        (file,) = sound_files_here(config, None)[0]
        parts = row_ranges.divided([file], config, lambda files: [row_ranges.find_ranges(files[0], config)])
        assert len(parts) >= 3
        assert_same(read_dataset(config), whole)
        sizes = [read_episodes(part, config, None).num_transitions for part in parts]
    assert found == [len(parts)]
    assert sum(sizes) == log.num_transitions
    assert max(sizes) <= 20
    assert sum(part.size for part in parts) <= file.size


def test_streams_of_one_large_file_are_those_of_whole_files(tmp_path: Path, pendulum_spec: Any) -> None:
    """Ids, split and units are the same, and workers can share the file."""
    log = make_episodes([7, 12, 3, 9, 20, 1, 1, 8] * 3)
    (tmp_path / "log").mkdir()
    write_rows("hdf5")(log, tmp_path / "log" / "0")
    write_rows("hdf5")(make_episodes([4, 5, 6]), tmp_path / "log" / "1")
    config = run_config(DataConfig(path=str(tmp_path / "log"), residency="streaming"))
    config = replace(config, data=replace(config.data, validation_fraction=0.3), storage_path=str(tmp_path / "runs"))

    def build(name: str) -> StreamingData:
        facts = FileFacts(replace(config, storage_path=str(tmp_path / name)), pendulum_spec)
        found, num_skipped = facts.sound_files()
        return StreamingData.build(found, facts, num_skipped_files=num_skipped)

    whole = build("whole")
    with ranges_of(400):
        for divided in (build("divided"), build("divided")):
            assert len(divided.files) > 4
            np.testing.assert_array_equal(divided.train_ids, whole.train_ids)
            np.testing.assert_allclose(divided.normalizer.observation_mean, whole.normalizer.observation_mean)
            assert divided.num_transitions == whole.num_transitions


def test_whole_numbers_in_one_block_and_others_in_the_next_are_read_as_in_a_whole_file(tmp_path: Path) -> None:
    rows = [f"{step // 5},{step if step < 20 else step + 0.5},0.5,{'' if step < 30 else 1},false" for step in range(60)]
    (tmp_path / "log.csv").write_text("\n".join(["episode_id,observation,action,reward,done", *rows]) + "\n\n")
    with pytest.raises(DataError, match=r"rewards hold \[nan\]"):
        read_dataset(DataConfig(path=str(tmp_path)))
    with ranges_of(200, block_bytes=300) as found, pytest.raises(DataError, match=r"rewards hold \[nan\]"):
        read_dataset(DataConfig(path=str(tmp_path)))
    assert found[0] > 3


def test_damage_to_a_range_is_named(tmp_path: Path) -> None:
    log = make_episodes([50, 60, 70])
    write_rows("npz")(log, tmp_path / "log")
    content = bytearray((tmp_path / "log.npz").read_bytes())
    at = content.find(log.observations[90:91].tobytes())
    content[at] ^= 1
    (tmp_path / "log.npz").write_bytes(bytes(content))
    with ranges_of(400), pytest.raises(DataError, match=r"log\.npz is no NPZ of plain arrays: Bad CRC-32"):
        read_dataset(DataConfig(path=str(tmp_path)))


def test_rows_before_a_range_are_not_read_from_an_uncompressed_npz(tmp_path: Path) -> None:
    columns = columns_of(make_episodes([5] * 40), naming="d4rl", ids=None, times=None)
    ROW_WRITERS["npz"](columns, tmp_path / "log")
    with (tmp_path / "log.npz").open("rb") as stream, lazy_arrays.zipped_arrays(stream) as arrays:  # type: ignore[arg-type]
        for name, values in columns.items():
            for rows in (slice(0, 3), slice(150, 999), slice(200, 300)):
                np.testing.assert_array_equal(arrays[name][rows], np.asarray(values)[rows])
            np.testing.assert_array_equal(arrays[name][()], values)

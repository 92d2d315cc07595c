"""Logs whose files are one episode each, without a column that says so: `data.episode_per_file`."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.examples import make_episodes, write_episodes
from support.streamed import streamed

from dt_ray.cli.data import main as run_data
from dt_ray.config.schema import DataConfig
from dt_ray.data import read_dataset
from dt_ray.data.logs import files as files_module
from dt_ray.data.logs.looks import read_log_spaces
from dt_ray.data.logs.sources import sound_files_here
from dt_ray.errors import DataError

LENGTHS = [4, 7, 5]


def write(file: Path, num: int, *, start: float = 0.0, **columns: Any) -> Path:
    """A file with a row per step, which counts its seconds from 0."""
    rows = {
        "time": np.arange(num) * 0.5,
        "observation": start + np.arange(num),
        "action": np.zeros(num),
        "reward": start + np.arange(num, dtype=float),
    }
    table = pa.table({name: values for name, values in (rows | columns).items() if values is not None})
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".csv":
        pyarrow.csv.write_csv(table, file)
    else:
        pq.write_table(table, file, row_group_size=2)
    return file


def hall(folder: Path, ending: str = "csv") -> Path:
    """Three runs of a machine, a file each, of which nothing in the files says that they are one."""
    for number, length in enumerate(LENGTHS):
        write(folder / f"run-{number}.{ending}", length, start=100.0 * number)
    return folder


def config(path: Path, **settings: Any) -> DataConfig:
    columns = {"timestep": "time"}
    return DataConfig(path=str(path), **{"episode_per_file": True, "columns": columns, **settings})


def test_a_log_without_any_sign_is_refused_with_the_setting_that_reads_it(tmp_path: Path) -> None:
    hall(tmp_path)
    with pytest.raises(DataError, match=r"run-0.csv: nothing says where episodes end.*data.episode_per_file=true"):
        read_dataset(config(tmp_path, episode_per_file=False))


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_each_file_is_one_episode_in_the_order_of_the_files_names(
    ending: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="dt_ray"):
        data = read_dataset(config(hall(tmp_path, ending)))
    assert data.lengths.tolist() == LENGTHS
    assert data.episode_ids.tolist() == [0, 1, 2]
    assert data.observations[data.starts, 0].tolist() == [0, 100, 200]
    assert data.truncated[data.ends - 1].all(), "the end of the file cut it: nothing says that the environment did"
    assert not caplog.text


@settings(max_examples=30, deadline=None)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6), seed=st.integers(0, 100))
def test_no_step_is_lost_or_moved(lengths: list[int], seed: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder, data = tmp_path_factory.mktemp("log"), make_episodes(lengths, observation_dim=1, seed=seed)
    for number in range(len(lengths)):
        part = data.select([number])
        steps = {name: getattr(part, f"{name}s")[:, 0] for name in ("observation", "action")}
        write(folder / f"{number}.parquet", lengths[number], reward=part.rewards, **steps)
    found = read_dataset(config(folder))
    assert found.lengths.tolist() == lengths
    for name in ("observations", "actions", "rewards"):
        np.testing.assert_array_equal(getattr(found, name), getattr(data, name))


def test_rows_are_put_in_the_order_of_their_times(tmp_path: Path) -> None:
    times = np.array([1.5, 0.0, 1.0, 0.5])
    write(tmp_path / "a.csv", 4, time=times)
    assert read_dataset(config(tmp_path)).rewards.tolist() == [1, 3, 2, 0]


def test_streaming_reads_the_same_episodes(tmp_path: Path) -> None:
    settings = config(hall(tmp_path))
    kept = streamed(settings, read_dataset(settings))
    assert sorted(length for part in kept for length in part.lengths) == sorted(LENGTHS)


def test_a_large_file_is_one_episode_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hall(tmp_path, "parquet")
    monkeypatch.setattr(files_module, "PART_BYTES", 1)
    assert len(files_module.find_files(str(tmp_path))) > 3, "its row groups are read one by one"
    assert read_dataset(config(tmp_path)).lengths.tolist() == LENGTHS


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({"episode": [3, 3, 4, 4]}, "row 0 has the episode id 3 and row 2 the id 4"),
        ({"done": [False, True, False, False]}, "row 1 ends an episode and more rows follow"),
        ({"is_first": [True, False, True, False]}, "row 2 is marked as the start of an episode"),
        ({"time": [0.0, 0.5, 0.0, 0.5]}, "its timesteps start again: 0.5 is followed by 0 in row 2"),
    ],
)
def test_a_file_that_says_otherwise_is_refused(columns: dict[str, Any], says: str, tmp_path: Path) -> None:
    write(tmp_path / "a.csv", 4, **columns)
    with pytest.raises(DataError, match=rf"a.csv: data.episode_per_file says .* but {says}; leave out the setting"):
        read_dataset(config(tmp_path))


def test_ids_and_ends_that_agree_are_taken(tmp_path: Path) -> None:
    for number in range(2):
        write(tmp_path / f"{number}.csv", 3, episode=[7] * 3, done=[False, False, number == 0])
    data = read_dataset(config(tmp_path))
    assert data.terminated[data.ends - 1].tolist() == [True, False]
    assert data.episode_ids.tolist() == [0, 1]


def test_arrays_of_several_episodes_and_packed_ones_are_refused(tmp_path: Path) -> None:
    arrays = {"observations": np.ones((6, 2)), "actions": np.zeros((6, 1)), "rewards": np.arange(6.0)}
    np.savez(tmp_path / "log.npz", **arrays)
    assert read_dataset(DataConfig(path=str(tmp_path), episode_per_file=True)).lengths.tolist() == [6]
    file = write_episodes(make_episodes([3, 3]), tmp_path / "packed" / "part.parquet")
    with pytest.raises(DataError, match="part.parquet holds whole episodes.* leave out data.episode_per_file"):
        read_dataset(DataConfig(path=str(file), episode_per_file=True))


def test_a_file_that_can_not_be_read_is_named_and_may_be_left_out(tmp_path: Path) -> None:
    hall(tmp_path)
    (tmp_path / "run-1.csv").write_text("this,is\nno,log\n")
    with pytest.raises(DataError, match=r"run-1.csv: no column for observation, action, reward"):
        read_dataset(config(tmp_path))
    write(tmp_path / "run-1.csv", 7, reward=[1.0, np.nan, 1, 1, 1, 1, 1])
    with pytest.raises(DataError, match=r"run-1.csv can't be trained on.*\n  episode 0, step 1: rewards hold"):
        read_dataset(config(tmp_path))
    files, num_skipped = sound_files_here(config(tmp_path, on_corrupt="skip"), None)
    assert ([Path(file.path).name for file in files], num_skipped) == (["run-0.csv", "run-2.csv"], 1)
    data = read_dataset(config(tmp_path, on_corrupt="skip"))
    assert (data.lengths.tolist(), data.episode_ids.tolist()) == ([4, 5], [0, 2])


def test_the_first_file_may_be_the_one_that_is_left_out(tmp_path: Path) -> None:
    hall(tmp_path)
    (tmp_path / "notes.csv").write_text("this,is\nno,log\n")
    assert read_log_spaces(config(tmp_path, on_corrupt="skip")).observation_dim == 1
    with pytest.raises(DataError, match=r"notes.csv: no column for observation"):
        read_log_spaces(config(tmp_path))


def test_the_commands_take_it_and_describe_passes_it_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hall(tmp_path / "hall")
    options = ["--column", "timestep=time", "--episode-per-file"]
    run_data(["describe", str(tmp_path / "hall"), *options])
    assert "data.columns.timestep=time data.episode_per_file=true" in capsys.readouterr().out
    run_data(["import", str(tmp_path / "hall"), *options, "--workers", "0", "--out", str(tmp_path / "packed")])
    assert read_dataset(DataConfig(path=str(tmp_path / "packed"))).lengths.tolist() == LENGTHS
    with pytest.raises(SystemExit):
        run_data(["describe", str(tmp_path), "--episode-per-file", "--episodes-across-files", "true"])

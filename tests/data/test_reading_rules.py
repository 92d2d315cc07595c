"""The laws of reading: what ends an episode and how, which rows are one episode, and what is refused by name."""

from __future__ import annotations

import logging
import pickle
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from support.examples import make_episodes, write_episodes

from dt_ray.cli.data import main as run_data
from dt_ray.config.schema import DataConfig
from dt_ray.data import TransitionDataset, read_dataset
from dt_ray.data.spaces import SpaceSpec
from dt_ray.errors import DataError

KINDS = {"terminated": [1, 0, 0, 0, 0, 0], "truncated": [0, 0, 0, 1, 0, 0], "either": [1, 0, 0, 1, 0, 0]}
LAST = [1, 0, 0, 1, 0, 1]  # the last episode is cut by the end of the log
FIRST = [1, 1, 0, 0, 1, 0]


def read(path: Path, **settings: Any) -> TransitionDataset:
    return read_dataset(DataConfig(path=str(path), **settings))


def write(file: Path, num: int = 6, **columns: Any) -> Path:
    rows = {"observation": np.arange(num) / 8, "action": np.zeros(num), "reward": np.arange(num, dtype=float)}
    table = pa.table({name: values for name, values in (rows | columns).items() if values is not None})
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".csv":
        pyarrow.csv.write_csv(table, file)
    else:
        pq.write_table(table, file)
    return file


def ends_of(data: TransitionDataset) -> tuple[list[int], list[bool]]:
    return data.lengths.tolist(), data.terminated[data.ends - 1].tolist()


def flags(values: list[int]) -> list[bool]:
    return [value == 1 for value in values]


@pytest.mark.parametrize(
    ("columns", "terminated"),
    [
        ({"terminations": "terminated", "truncations": "truncated"}, [True, False, False]),
        ({"terminated": "terminated", "done": "either"}, [True, False, False]),
        ({"done": "either", "timeout": "truncated"}, [True, False, False]),
        ({"dones": "either", "TimeLimit.truncated": "truncated"}, [True, False, False]),
        ({"is_terminal": "terminated", "is_last": "last"}, [True, False, False]),
        ({"terminals": "terminated", "episode_terminals": "last"}, [True, False, False]),
        ({"Terminated": "terminated", "is_first": "first"}, [True, False, False]),
        ({"episode_starts": "first"}, [False, False, False]),
        ({"is_last": "last"}, [False, False, False]),
        ({"done": "last"}, [True, True, True]),
        ({"terminated": "either", "truncated": "truncated"}, [True, True, False]),  # Gymnasium allows both
    ],
)
@pytest.mark.parametrize("ending", ["csv", "parquet", "npz"])
def test_every_end_counts_and_the_most_specific_one_says_which_it_was(
    columns: dict[str, str], terminated: list[bool], ending: str, tmp_path: Path
) -> None:
    marks = {name: flags({**KINDS, "last": LAST, "first": FIRST}[kind]) for name, kind in columns.items()}
    if ending == "npz":
        rows = {"observations": np.zeros((6, 2)), "actions": np.zeros((6, 1)), "rewards": np.arange(6.0)}
        np.savez(tmp_path / "log.npz", **rows, **{name: np.array(each) for name, each in marks.items()})
    else:
        write(tmp_path / f"log.{ending}", **marks)
    assert ends_of(read(tmp_path)) == ([1, 3, 2], terminated)


@pytest.mark.parametrize(
    "values",
    [[0.0, float("nan"), 1.0], [0, 2, 1], ["no", "maybe", "yes"], [False, None, True], [[1, 0], [0, 0], [0, 1]]],
)
@pytest.mark.parametrize("name", ["terminated", "truncated", "done", "is_last", "is_first"])
def test_a_signal_that_is_not_understood_is_refused_by_name(name: str, values: list[Any], tmp_path: Path) -> None:
    write(tmp_path / "log.parquet", 3, episode_id=[1, 1, 1], **{name: values})
    with pytest.raises(DataError, match=rf"log.parquet, column {name}.* true and false, yes and no.*=null"):
        read(tmp_path)


def test_a_start_that_contradicts_an_end_or_an_id_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", done=flags(LAST), is_first=flags([1, 0, 0, 0, 1, 0]))
    with pytest.raises(DataError, match="row 0 ends an episode and row 1 is not marked as the start of one"):
        read(tmp_path / "a.parquet")
    write(tmp_path / "b.parquet", episode_id=[0, 0, 0, 1, 1, 1], is_first=flags([1, 0, 1, 1, 0, 0]))
    with pytest.raises(DataError, match="b.parquet, episode 0: step 2 is marked as a start, against the ids"):
        read(tmp_path / "b.parquet")


def test_several_columns_under_one_name_all_count(tmp_path: Path) -> None:
    marks = {"failed": flags([1, 0, 0, 0, 0, 0]), "success": flags([0, 0, 0, 1, 0, 0])}
    write(tmp_path / "a.csv", r2=np.ones(6), **marks)
    data = read(tmp_path, columns={"terminated": "failed,success", "reward": "reward, r2"})
    assert ends_of(data) == ([1, 3, 2], [True, True, False])
    assert data.rewards.tolist() == [1, 2, 3, 4, 5, 6]
    write(tmp_path / "a.csv", run=["a", "a", "a", "b", "b", "b"], episode=[0, 0, 1, 0, 1, 1])
    assert read(tmp_path, columns={"episode_id": "run,episode"}).lengths.tolist() == [2, 1, 1, 2]
    write(tmp_path / "a.csv", t=np.arange(6), u=np.arange(6), done=flags(LAST))
    with pytest.raises(DataError, match="data.columns.timestep takes one column, got t, u"):
        read(tmp_path, columns={"timestep": "t,u"})


def worker(folder: Path, number: int, **columns: Any) -> None:
    write(folder / f"worker_{number}.csv", 5, episode=[0, 0, 1, 1, 1], **columns)


@pytest.mark.parametrize(
    "marks", [{}, {"done": flags([0, 1, 0, 0, 0])}, {"t": [0, 1, 0, 1, 2]}, {"t": [0, 0, 0, 0, 0]}]
)
def test_files_that_each_count_from_zero_share_no_episode(
    marks: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(3):
        worker(tmp_path, number, **marks)
    with caplog.at_level(logging.WARNING, logger="dt_ray"):
        data = read(tmp_path)
    assert data.lengths.tolist() == [2, 3] * 3
    assert len(set(data.episode_ids.tolist())) == 6
    said = marks.get("t") == [0, 1, 0, 1, 2]  # where nothing tells them apart, a line says so
    assert ("set data.episodes_across_files=true" in caplog.text) != said
    assert read(tmp_path, episodes_across_files=False).num_episodes == 6


def test_a_setting_joins_what_nothing_tells_apart(tmp_path: Path) -> None:
    for number in range(3):
        worker(tmp_path, number)
    joined = read(tmp_path, episodes_across_files=True)
    assert joined.lengths.tolist() == [6, 9]
    assert joined.rewards.tolist() == [0, 1] * 3 + [2, 3, 4] * 3


@pytest.mark.parametrize(
    "evidence",
    [
        {"t": [[0, 1, 0], [1, 2, 3]]},
        {"next_observation": [[0.0, 1.0, 0.0], [0.0, 0.0, 0.0]]},
        {},  # ids that count on
    ],
)
def test_an_episode_goes_on_in_another_file_where_the_log_says_so(
    evidence: dict[str, list[list[float]]], tmp_path: Path
) -> None:
    for number, ids in enumerate(([0, 0, 1], [1, 1, 1])):
        write(tmp_path / f"{number}.parquet", 3, episode=ids, **{name: each[number] for name, each in evidence.items()})
    data = read(tmp_path)
    assert data.lengths.tolist() == [2, 4]
    assert data.episode_ids.tolist() == [0, 1]
    assert read(tmp_path, episodes_across_files=False).lengths.tolist() == [2, 1, 3]


def test_files_of_several_formats_are_refused_until_one_is_named(tmp_path: Path) -> None:
    for number in range(3):
        write(tmp_path / f"{number}.csv", done=flags(LAST))
    write(tmp_path / "other.parquet", done=flags(LAST))
    (tmp_path / "notes.json").write_text("{}")
    with pytest.raises(DataError, match=r"several formats, 1 of parquet, 3 of csv; .* data.format=csv"):
        read(tmp_path)
    assert read(tmp_path, format="csv").num_episodes == 9
    assert read(tmp_path, format="parquet").num_episodes == 3


def test_a_column_that_is_named_and_not_there_is_named_with_one_like_it(tmp_path: Path) -> None:
    write(tmp_path / "log.csv", temperature=np.ones(6))
    with pytest.raises(
        DataError, match=r"for observation \(temprature: not there\) .*did you mean temperature for tem"
    ):
        read(tmp_path, columns={"observation": "temprature"})


def test_what_is_wrong_with_an_episode_comes_with_what_mends_it(tmp_path: Path) -> None:
    write(tmp_path / "log.csv", observation=[0, 1, np.nan, 3, 4, 5], done=flags(LAST))
    with pytest.raises(DataError, match=r"trained on; leave such episodes out of the log.*:\n  episode 1, step 1: obs"):
        read(tmp_path)
    file = write_episodes(make_episodes([3, 3]), tmp_path / "part.parquet")
    spec = SpaceSpec(observation_dim=3, action_dim=1, action_low=(-1.0,), action_high=(1.0,))
    with pytest.raises(
        DataError, match="out_of_bounds=clip clips them; data.on_corrupt=skip leaves out the whole file:"
    ):
        read_dataset(DataConfig(path=str(file)), spec)


def test_a_missing_step_between_two_files_is_named(tmp_path: Path) -> None:
    write(tmp_path / "a.csv", 2, episode=[7, 7], t=[0, 1])
    write(tmp_path / "b.csv", 2, episode=[7, 7], t=[3, 4])
    with pytest.raises(DataError, match=r"episode 7: in .*a.csv timestep 1 is followed by 3 in .*b.csv.*=false"):
        read(tmp_path)


def test_a_file_without_ids_ends_its_last_episode(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for number in range(2):
        write(tmp_path / f"{number}.csv", 5, done=flags([0, 1, 0, 0, 0]))
    with caplog.at_level(logging.WARNING, logger="dt_ray"):
        assert ends_of(read(tmp_path)) == ([2, 3, 2, 3], [True, False] * 2)
    assert "0.csv has no end: read as cut there" in caplog.text
    assert read(tmp_path, episodes_across_files=True).lengths.tolist() == [2, 5, 3]
    for number in range(2):
        write(tmp_path / f"{number}.csv", 5, done=flags([0, 1, 0, 0, 0]), is_first=flags([1 - number, 0, 1, 0, 0]))
    assert read(tmp_path).lengths.tolist() == [2, 5, 3]  # its first row is not marked as a start


def test_an_id_that_comes_back_is_another_episode_or_refused(tmp_path: Path) -> None:
    ids = [0, 0, 1, 1, 0, 0]
    write(tmp_path / "log.csv", episode=ids)
    with pytest.raises(DataError, match="the id of episode 0 comes back in row 4 .* data.columns.timestep=NAME"):
        read(tmp_path)
    write(tmp_path / "log.csv", episode=ids, done=flags([0, 1, 0, 1, 0, 1]))
    data = read(tmp_path)
    assert sorted(data.episode_returns) == [1, 5, 9]
    assert len(set(data.episode_ids.tolist())) == 3
    write(tmp_path / "log.csv", episode=ids, t=[0, 1, 0, 1, 0, 1])
    assert sorted(read(tmp_path).episode_returns) == [1, 5, 9]
    write(tmp_path / "log.csv", episode=ids, t=[0, 1, 0, 1, 2, 3])
    assert sorted(read(tmp_path).episode_returns) == [5, 10]
    interleaved = [0, 1, 0, 1, 0, 1]
    write(tmp_path / "log.csv", episode=interleaved, done=flags([0, 0, 0, 0, 1, 1]))
    assert sorted(read(tmp_path).episode_returns) == [6, 9]


def test_datasets_in_one_folder_share_no_episode_in_any_residency(tmp_path: Path) -> None:
    from support.streamed import streamed

    for number in range(2):
        write_episodes(make_episodes([3, 4, 5], seed=number), tmp_path / f"{number}" / "part.parquet")
    data = read(tmp_path)
    assert len(set(data.episode_ids.tolist())) == 6
    config = DataConfig(path=str(tmp_path), max_episodes=4)
    kept = streamed(config, data.select(range(4)))
    assert sorted(length for part in kept for length in part.lengths) == [3, 3, 4, 5]
    assert read(tmp_path / "0").episode_ids.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("times", "message"),
    [
        ([0, 1, 2, 0, 1, 2], "timestep 2 is followed by 0"),
        ([0, 0, 1, 1, 2, 2], "timestep 0 is followed by 0"),
        ([0, 1, 2, 3, 5, 6], "timestep 3 is followed by 5"),
        ([0, 1, 3, 4, 5, 7], "timestep 1 is followed by 3"),
    ],
)
def test_an_index_with_a_gap_or_a_repetition_is_refused(times: list[int], message: str, tmp_path: Path) -> None:
    write(tmp_path / "log.csv", episode=[4] * 6, t=times)
    with pytest.raises(DataError, match=f"log.csv, episode 4: {message}; a step is missing or twice there"):
        read(tmp_path)
    assert read(tmp_path, columns={"timestep": None}).lengths.tolist() == [6]


@pytest.mark.parametrize("times", [[0, 0.05, 0, 0.05, 0.1, 0.15], [0, 4, 0, 4, 8, 12], [10, 11.5, 3, 4, 4, 9]])
def test_a_clock_orders_the_steps_and_is_no_index(times: list[float], tmp_path: Path) -> None:
    write(tmp_path / "log.csv", episode=[0, 0, 1, 1, 1, 1], t=times)
    assert read(tmp_path).lengths.tolist() == [2, 4]
    backwards = pyarrow.csv.read_csv(tmp_path / "log.csv").take([1, 0, 2, 3, 4, 5])
    pyarrow.csv.write_csv(backwards, tmp_path / "log.csv")
    assert read(tmp_path).rewards.tolist() == [0, 1, 2, 3, 4, 5]
    assert read(tmp_path, columns={"timestep": None}).rewards.tolist() == [1, 0, 2, 3, 4, 5]


def test_timestamps_order_the_steps(tmp_path: Path) -> None:
    times = np.datetime64("2024-01-01T00:00:00") + np.arange(6) * np.timedelta64(250, "ms")
    write(tmp_path / "log.parquet", episode=[0, 0, 1, 1, 1, 1], timestep=times)
    assert read(tmp_path).lengths.tolist() == [2, 4]


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]
)
def test_text_ids_of_every_arrow_type(kind: pa.DataType, tmp_path: Path) -> None:
    texts = pa.array(["b", "b", "a", "a", "a", "c"])
    ids = texts.dictionary_encode() if pa.types.is_dictionary(kind) else texts.cast(kind)
    write(tmp_path / "log.parquet", episode_id=ids)
    assert read(tmp_path).lengths.tolist() == [3, 2, 1]  # in the order of their ids


def test_dates_and_whole_floats_are_ids_and_other_floats_are_not(tmp_path: Path) -> None:
    days = np.datetime64("2024-01-01") + np.array([1, 1, 0, 0, 0, 2])
    for ids in (days, days.astype("datetime64[us]"), np.array([1.0, 1, 0, 0, 0, 2])):
        write(tmp_path / "log.parquet", episode_id=ids)
        assert read(tmp_path).lengths.tolist() == [3, 2, 1]
    write(tmp_path / "log.parquet", episode_id=[0.5, 1, 1, 1, 1, 1])
    with pytest.raises(DataError, match="episode_id must be a whole number or a text at every step, found 0.5"):
        read(tmp_path)


def test_folders_named_by_a_column_give_it(tmp_path: Path) -> None:
    for run, episode, num in (("a", 0, 2), ("a", 1, 3), ("b", 0, 4)):
        write(tmp_path / f"run={run}" / f"episode={episode}" / "part.parquet", num)
    assert read(tmp_path, columns={"episode_id": "run,episode"}).lengths.tolist() == [2, 3, 4]
    write(tmp_path / "run=b" / "episode=0" / "part-2.parquet", 2)  # the folder says that it is the same one
    assert read(tmp_path, columns={"episode_id": "run,episode"}).lengths.tolist() == [2, 3, 6]


def test_vectors_and_booleans_may_be_texts(tmp_path: Path) -> None:
    vectors = [f"[{i}, {i / 2}]" for i in range(6)]
    write(tmp_path / "log.csv", observation=vectors, Done=["Yes", "no", "No", "YES ", "n", "y"])
    data = read(tmp_path)
    assert data.observations.tolist() == [[i, i / 2] for i in range(6)]
    assert data.lengths.tolist() == [1, 3, 2]
    write(tmp_path / "log.csv", observation=["[1, 2]", "[1]"] * 3, Done=["no"] * 6)
    with pytest.raises(DataError, match=r"observation: vectors of different dimensions \[1, 2\]"):
        read(tmp_path)


def test_a_column_of_whole_numbers_may_go_on_with_others(tmp_path: Path) -> None:
    lines = "\n".join(f"{i % 7},0,1,{i // 100}" for i in range(300_000))
    (tmp_path / "log.csv").write_text(f"observation,action,reward,episode\n{lines}\n0.5,0.25,1,3000\n")
    assert read(tmp_path).actions[-1, 0] == 0.25


def test_decimal_commas(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("observation;action;reward;done\n0,5;1,25;2;0\n1,5;0,25;3;1\n")
    data = read(tmp_path)
    assert data.observations[:, 0].tolist() == [0.5, 1.5]
    assert data.rewards.tolist() == [2, 3]


def test_names_that_are_not_in_utf_8_are_refused(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_bytes("observation,action,reward,épisode\n1,2,3,0\n".encode("latin-1"))
    with pytest.raises(DataError, match="log.csv is not a readable CSV file: its names are not written in UTF-8"):
        read(tmp_path)


def test_only_a_header_is_empty(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("observation,action,reward,episode\n")
    with pytest.raises(DataError, match="log.csv is empty"):
        read(tmp_path)


def arrays(num: int = 6, **more: Any) -> dict[str, Any]:
    return {"observations": np.ones((num, 2)), "actions": np.zeros((num, 1)), "rewards": np.arange(num * 1.0)} | more


def save(folder: Path, content: dict[str, Any], ending: str) -> Path:
    file = folder / f"log.{ending}"
    if ending == "npz":
        np.savez(file, **content)
    elif ending == "hdf5":
        with h5py.File(file, "w") as h5:
            for name, values in content.items():
                h5[name] = values
    else:
        file.write_bytes(pickle.dumps(content))
    return file


@pytest.mark.parametrize("ending", ["npz", "hdf5", "pkl"])
@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            {"terminals": np.zeros(5, bool)},
            "arrays of different lengths: observations 6, actions 6, rewards 6, terminals 5",
        ),
        ({"rewards": np.zeros((6, 2))}, r"rewards has the shape \(6, 2\); it takes one value for each step"),
        ({"observations": np.ones((6, 2), complex)}, "observations holds complex128; it takes real numbers"),
        ({"observations": np.ones((6, 4, 3))}, r"observations has the shape \(6, 4, 3\).*no images"),
        ({"rewards": np.float64(1)}, "rewards is one number; every step needs its own"),
        ({"terminals": np.full(6, np.nan)}, "column terminals: nan in row 0"),
        ({"episode_starts": np.array([0, 3, 2])}, r"places of starts go up from 0 .* got \[0, 3, 2\]"),
        ({}, "nothing says where episodes end"),
    ],
)
def test_arrays_that_do_not_fit_are_refused_by_name(
    more: dict[str, Any], message: str, ending: str, tmp_path: Path
) -> None:
    save(tmp_path, arrays(**more), ending)
    with pytest.raises(DataError, match=message):
        read(tmp_path)


@pytest.mark.parametrize("ending", ["npz", "hdf5", "pkl"])
def test_arrays_take_columns_like_tables(ending: str, tmp_path: Path) -> None:
    content = {"pos": np.ones((6, 2)), "vel": np.zeros((6, 1)), "u": np.zeros((6, 1)), "gain": np.arange(6.0)}
    save(tmp_path, content | {"over": np.array([0, 1, 0, 0, 0, 1])}, ending)
    columns = {"observation": "pos,vel", "action": "u", "reward": "gain", "terminated": "over"}
    data = read(tmp_path, columns=columns)
    assert data.observations.shape == (6, 3)
    assert ends_of(data) == ([2, 4], [True, True])
    with pytest.raises(DataError, match="no column for observation, action, reward among .*data.columns.observation"):
        read(tmp_path)


@pytest.mark.parametrize("ending", ["npz", "hdf5", "pkl"])
def test_one_observation_more_is_what_came_after_the_last_step(ending: str, tmp_path: Path) -> None:
    observations = np.arange(14.0).reshape(7, 2)
    save(tmp_path, arrays(observations=observations, terminals=np.array([0, 0, 1, 0, 0, 0])), ending)
    data = read(tmp_path)
    assert data.num_transitions == 6
    assert data.final_observations is not None
    assert data.final_observations[-1].tolist() == [12, 13]


def test_stacked_arrays_need_something_that_says_which_axis_is_which(tmp_path: Path) -> None:
    stacked = {name: values.reshape(2, 3, *values.shape[1:]) for name, values in arrays().items()}
    ends = np.array([[0, 0, 1], [0, 0, 1]])
    save(tmp_path, stacked | {"terminals": ends}, "npz")
    assert ends_of(read(tmp_path)) == ([3, 3], [True, True])
    save(tmp_path, stacked | {"terminals": np.zeros((2, 3))}, "npz")
    with pytest.raises(DataError, match=r"arrays of 2 x 3 steps.*data.time_limit=3"):
        read(tmp_path)
    assert read(tmp_path, time_limit=3).lengths.tolist() == [3, 3]


def test_parts_of_different_dimensions_are_named(tmp_path: Path) -> None:
    two = [arrays(terminals=np.eye(6)[5]), arrays(observations=np.ones((6, 3)), terminals=np.eye(6)[5])]
    (tmp_path / "log.pkl").write_bytes(pickle.dumps(two))
    with pytest.raises(DataError, match=r"observations has .* in the first part and .* in part 1 \(trajectory 1\)"):
        read(tmp_path)
    (tmp_path / "log.pkl").write_bytes(pickle.dumps([]))
    with pytest.raises(DataError, match="log.pkl is empty"):
        read(tmp_path)


def test_a_log_in_which_nothing_ends_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path, arrays(terminals=np.zeros(6, bool)), "npz")
    with caplog.at_level(logging.WARNING, logger="dt_ray"):
        assert read(tmp_path).lengths.tolist() == [6]
    assert "no step ends an episode, so all 6 are read as one" in caplog.text


def test_a_column_that_one_file_lacks_is_named(tmp_path: Path) -> None:
    write(tmp_path / "a.csv", episode=[0] * 6, rtg=np.arange(6))
    write(tmp_path / "b.csv", episode=[1] * 6)
    with pytest.raises(DataError, match=r"a.csv has a column of returns-to-go but .*b.csv has none.*return_to_go=null"):
        read(tmp_path)
    assert read(tmp_path, columns={"return_to_go": None}).num_episodes == 2


def test_a_list_of_rewards_a_step_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "log.parquet", episode=[0] * 6, reward=[[1.0, 2.0]] * 6)
    with pytest.raises(DataError, match="reward holds 2 numbers a step"):
        read(tmp_path)


def test_columns_of_whole_episodes_are_not_renamed_in_silence(tmp_path: Path) -> None:
    write_episodes(make_episodes([3]), tmp_path / "part.parquet")
    with pytest.raises(DataError, match=r"part.parquet holds whole episodes.*leave out data.columns .*, got reward"):
        read(tmp_path, columns={"reward": "bonus"})


def test_columns_and_the_setting_are_options_of_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(2):
        moving = number + np.arange(3) / 8
        write(tmp_path / f"{number}.csv", 3, run=[0, 0, 1], t=[5, 3, 4], observation=moving)
    options = ["--column", "episode_id=run", "--column", "timestep="]
    run_data(["describe", str(tmp_path), *options])
    assert "4" in capsys.readouterr().out
    run_data(["validate", str(tmp_path), *options, "--episodes-across-files", "true"])
    assert "2 episodes, 6 steps" in capsys.readouterr().out

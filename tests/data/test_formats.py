"""The dataset on disk: what is written is what is read, and what is wrong is named."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.datasets import assert_same, write_flat
from support.examples import make_episodes, write_episodes

from dt_ray.config.schema import DataConfig
from dt_ray.data import TransitionDataset, read_dataset
from dt_ray.data.logs import files
from dt_ray.data.logs.episodes import from_table, to_table
from dt_ray.data.spaces import SpaceSpec
from dt_ray.errors import DataError
from dt_ray.play.collection import flatten

lengths = st.lists(st.integers(1, 9), min_size=1, max_size=6)


@given(lengths, st.integers(1, 4), st.integers(1, 3))
def test_an_episode_table_gives_back_its_episodes(lengths: list[int], observation_dim: int, action_dim: int) -> None:
    data = make_episodes(lengths, observation_dim=observation_dim, action_dim=action_dim)
    assert_same(from_table(to_table(data), source="test"), data)
    sliced = from_table(to_table(data).slice(1), source="test")
    assert_same(sliced, data.select(np.arange(1, data.num_episodes)))


def test_the_format_on_disk_is_the_published_one(tmp_path: Path) -> None:
    schema = pq.read_schema(write_episodes(make_episodes([3, 2]), tmp_path / "a.parquet"))
    assert schema.field("observations").type == pa.list_(pa.list_(pa.float32(), 3))
    assert schema.field("actions").type == pa.list_(pa.list_(pa.float32(), 1))
    assert schema.field("rewards").type == pa.list_(pa.float32())
    assert [str(schema.field(name).type) for name in ("episode_id", "terminated", "truncated")] == [
        "int64",
        "bool",
        "bool",
    ]
    assert b'"format_version": 1' in schema.metadata[b"dt_ray"]


@pytest.mark.parametrize(
    "drop", [(), ("timestep",), ("episode_id",), ("episode_id", "timestep"), ("terminated", "truncated")]
)
@pytest.mark.parametrize("num_files", [1, 4])
def test_flat_transitions_are_packed_into_the_same_episodes(
    tmp_path: Path, drop: tuple[str, ...], num_files: int
) -> None:
    data = make_episodes([5, 1, 8, 3, 7])
    config = write_flat(data, tmp_path / "flat", num_files=num_files, drop=drop)
    nothing_goes_on = {"episode_id", "timestep"} <= set(drop)  # from file to file, as the log itself says
    packed = read_dataset(replace(config, episodes_across_files=True if nothing_goes_on else "auto"))
    assert_same(packed, data)


def test_rows_out_of_order_are_sorted_by_their_timestep(tmp_path: Path) -> None:
    data = make_episodes([5, 8, 3])
    rows = flatten(to_table(data))
    order = np.random.default_rng(0).permutation(len(rows))
    pq.write_table(rows.take(order), tmp_path / "rows.parquet")
    assert_same(read_dataset(DataConfig(path=str(tmp_path))), data)


def test_a_missing_step_is_named(tmp_path: Path) -> None:
    rows = flatten(to_table(make_episodes([5, 8])))
    pq.write_table(rows.filter(np.arange(len(rows)) != 8), tmp_path / "rows.parquet")
    with pytest.raises(DataError, match="episode 1: timestep 2 is followed by 4"):
        read_dataset(DataConfig(path=str(tmp_path)))


def test_a_row_that_is_there_twice_is_named(tmp_path: Path) -> None:
    rows = flatten(to_table(make_episodes([5, 8])))
    pq.write_table(rows.take([*range(9), *range(8, 13)]), tmp_path / "rows.parquet")
    with pytest.raises(DataError, match="episode 1: timestep 3 is followed by 3; a step is missing or twice there"):
        read_dataset(DataConfig(path=str(tmp_path)))


def test_columns_and_action_scale_are_settings(tmp_path: Path) -> None:
    data = make_episodes([4, 4])
    rows = flatten(to_table(data)).rename_columns(["id", "k", "o", "a", "r", "d", "c"])
    pq.write_table(rows, tmp_path / "rows.parquet")
    with pytest.raises(
        DataError, match=r"no column for observation, action, reward among .*data.columns.observation=NAME"
    ):
        read_dataset(DataConfig(path=str(tmp_path)))
    columns = {"episode_id": "id", "observation": "o", "action": "a", "reward": "r"}
    read = read_dataset(DataConfig(path=str(tmp_path), columns=columns, action_scale=2.0))
    np.testing.assert_array_equal(read.actions, 2 * data.actions)
    with pytest.raises(DataError, match="data.columns names obs"):
        read_dataset(DataConfig(path=str(tmp_path), columns={"obs": "obs"}))


SPEC = SpaceSpec(observation_dim=3, action_dim=1, action_low=(-2.0,), action_high=(2.0,))


def broken(name: str, value: float) -> TransitionDataset:
    data = make_episodes([4, 5])
    getattr(data, name)[6] = value
    return data


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (broken("rewards", np.nan), "episode 1, step 2: rewards hold [nan]"),
        (broken("observations", np.inf), "episode 1, step 2: observations hold [inf, inf, inf]"),
        (broken("actions", 3.0), "episode 1, step 2: action [3.] is outside the environment's bounds [-2.]..[2.]"),
        (make_episodes([4], observation_dim=5), "observations have 5 dimension(s) where the environment has 3"),
    ],
)
def test_a_fault_is_named_by_file_episode_and_step(tmp_path: Path, data: TransitionDataset, message: str) -> None:
    write_episodes(make_episodes([3]), tmp_path / "good.parquet")
    write_episodes(data, tmp_path / "sub" / "bad.parquet")
    with pytest.raises(DataError) as error:
        read_dataset(DataConfig(path=str(tmp_path)), SPEC)
    assert "bad.parquet" in str(error.value)
    assert message in str(error.value)


def test_files_that_do_not_go_together_are_both_named(tmp_path: Path) -> None:
    write_episodes(make_episodes([3]), tmp_path / "a.parquet")
    write_episodes(make_episodes([3], action_dim=2), tmp_path / "b.parquet")
    with pytest.raises(
        DataError, match=r"a.parquet has \(observation, action\) dimensions \(3, 1\) but .*b.parquet has \(3, 2\)"
    ):
        read_dataset(DataConfig(path=str(tmp_path)))
    pq.write_table(flatten(to_table(make_episodes([3]))), tmp_path / "b.parquet")
    with pytest.raises(DataError, match="a row per step but .*a row per episode"):
        read_dataset(DataConfig(path=str(tmp_path)))


def test_unreadable_datasets_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no dataset at .*collect"):
        read_dataset(DataConfig(path=str(tmp_path / "nowhere")))
    with pytest.raises(DataError, match="no dataset at minari:some/where-v0; `minari download some/where-v0` puts"):
        read_dataset(DataConfig(path="minari:some/where-v0"))
    with pytest.raises(DataError, match="no .*parquet file"):
        read_dataset(DataConfig(path=str(tmp_path)))
    (tmp_path / "text.parquet").write_text("not parquet")
    with pytest.raises(DataError, match=r"text.parquet is not a readable Parquet file"):
        read_dataset(DataConfig(path=str(tmp_path)))
    content = write_episodes(make_episodes([30]), tmp_path / "text.parquet").read_bytes()
    (tmp_path / "text.parquet").write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"text.parquet is not a readable Parquet file"):
        read_dataset(DataConfig(path=str(tmp_path)))
    pq.write_table(to_table(make_episodes([3])).slice(0, 0), tmp_path / "text.parquet")
    with pytest.raises(DataError, match=r"text.parquet is empty"):
        read_dataset(DataConfig(path=str(tmp_path)))


@pytest.mark.parametrize("kind", ["episodes", "rows"])
def test_a_large_file_is_read_in_parts(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = make_episodes([5, 1, 8, 3, 7, 2])
    table = to_table(data) if kind == "episodes" else flatten(to_table(data))
    pq.write_table(table, tmp_path / "large.parquet", row_group_size=2)
    monkeypatch.setattr(files, "PART_BYTES", 1000)
    parts = files.find_files(str(tmp_path))
    assert 1 < len(parts) <= (len(table) + 1) // 2
    assert [part.index for part in parts] == list(range(len(parts)))
    assert_same(read_dataset(DataConfig(path=str(tmp_path))), data)

"""Logs as other libraries write them, read exactly, and the traps in them."""

import base64
import json
import pickle
from pathlib import Path
from typing import Any

import gymnasium as gym
import h5py
import lz4.frame
import minari
import msgpack
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from minari.data_collector.episode_buffer import EpisodeBuffer
from support.datasets import assert_same
from support.examples import make_episodes

from dt_ray.config.schema import DataConfig
from dt_ray.data import TransitionDataset, read_dataset
from dt_ray.data.logs.episodes import to_table
from dt_ray.errors import DataError
from dt_ray.play.collection import flatten

LENGTHS = [5, 1, 8, 3]


def episodes_of(data: TransitionDataset) -> list[TransitionDataset]:
    return [data.select([i]) for i in range(data.num_episodes)]


def read(path: Path, **settings: Any) -> TransitionDataset:
    return read_dataset(DataConfig(path=str(path), **settings))


def assert_same_episodes(left: TransitionDataset, right: TransitionDataset) -> None:
    """The same episodes, whatever their ids and their order."""
    order = [np.lexsort((data.episode_returns, data.lengths)) for data in (left, right)]
    one, other = left.select(order[0]), right.select(order[1])
    ids = np.arange(one.num_episodes)
    for data in (one, other):
        object.__setattr__(data, "episode_ids", ids)
    assert_same(one, other)


def terminated(data: TransitionDataset) -> TransitionDataset:
    """The same, the second episode ended by the environment."""
    last = data.ends[1] - 1
    data.terminated[last], data.truncated[last] = True, False
    return data


def test_csv_with_a_column_for_each_number(tmp_path: Path) -> None:
    data = make_episodes(LENGTHS)
    columns = {f"obs_{i}": data.observations[:, i] for i in range(3)} | {"torque": data.actions[:, 0]}
    columns |= {"reward": data.rewards, "episode": np.repeat(data.episode_ids, data.lengths), "t": data.timesteps}
    order = np.random.default_rng(0).permutation(data.num_transitions)
    pyarrow.csv.write_csv(pa.table(columns).take(order), tmp_path / "log.csv")
    assert_same(read(tmp_path, columns={"action": "torque"}), data)
    swapped = read(tmp_path / "log.csv", columns={"action": "torque", "observation": "obs_2, obs_0"})
    np.testing.assert_array_equal(swapped.observations, data.observations[:, [2, 0]])


def test_episode_ids_may_be_texts_in_any_file(tmp_path: Path) -> None:
    data = make_episodes(LENGTHS)
    rows = flatten(to_table(data))
    names = pa.array([f"episode {i}" for i in rows["episode_id"].to_pylist()])
    rows = rows.set_column(0, "eps_id", names)
    pq.write_table(rows.slice(0, 9), tmp_path / "a.parquet")
    pq.write_table(rows.slice(9), tmp_path / "b.parquet")
    assert_same_episodes(read(tmp_path), data)


def write_d4rl(data: TransitionDataset, file: Path, *, without: tuple[str, ...] = ()) -> None:
    following = np.concatenate([data.observations[1:], data.observations[:1]])  # a reset after each last step
    arrays = {"observations": data.observations, "actions": data.actions, "rewards": data.rewards}
    arrays |= {"terminals": data.terminated, "timeouts": data.truncated, "next_observations": following}
    with h5py.File(file, "w") as h5:
        for name, values in arrays.items():
            if name not in without:
                h5[name] = values


def test_d4rl_episodes_end_at_terminals_or_timeouts(tmp_path: Path) -> None:
    data = terminated(make_episodes(LENGTHS))
    write_d4rl(data, tmp_path / "d4rl.hdf5")
    assert_same(read(tmp_path), data)


def test_the_next_episodes_first_observation_is_not_taken_for_the_one_after_the_last_step(tmp_path: Path) -> None:
    write_d4rl(make_episodes(LENGTHS), tmp_path / "d4rl.hdf5")
    finals = read(tmp_path).final_observations
    assert finals is not None
    assert np.isnan(finals[:-1]).all()


def test_d4rl_without_timeouts_needs_the_time_limit(tmp_path: Path) -> None:
    data = make_episodes([4, 4, 4])
    write_d4rl(data, tmp_path / "d4rl.hdf5", without=("timeouts", "terminals"))
    with pytest.raises(DataError, match=r"nothing says where episodes end; .* set data.time_limit"):
        read(tmp_path)
    assert_same(read(tmp_path, time_limit=4), data)


def test_a_time_limit_that_was_logged_as_a_terminal_is_none(tmp_path: Path) -> None:
    data = make_episodes([4, 2, 4])
    wrong = TransitionDataset(
        observations=data.observations, actions=data.actions, rewards=data.rewards, terminated=data.truncated
    )
    write_d4rl(wrong, tmp_path / "d4rl.hdf5")
    last = read(tmp_path, time_limit=4).ends - 1
    assert read(tmp_path).terminated[last].tolist() == [True, True, True]
    assert read(tmp_path, time_limit=4).terminated[last].tolist() == [False, True, False]
    assert read(tmp_path, time_limit=4).truncated[last].tolist() == [True, False, True]


def test_d3rlpy_version_one_and_two(tmp_path: Path) -> None:
    data = terminated(make_episodes(LENGTHS))
    with h5py.File(tmp_path / "v1.h5", "w") as h5:
        h5["observations"], h5["actions"], h5["rewards"] = data.observations, data.actions, data.rewards
        h5["terminals"] = data.terminated.astype(np.float32)
        h5["episode_terminals"] = (data.terminated | data.truncated).astype(np.float32)
        h5["discrete_action"], h5["version"] = False, "1.0"
    with h5py.File(tmp_path / "v2.h5", "w") as h5:
        h5["columns"], h5["num_episodes"] = ["observations", "actions", "rewards", "terminated"], len(LENGTHS)
        for i, episode in enumerate(episodes_of(data)):
            h5[f"observations_{i}"], h5[f"actions_{i}"] = episode.observations, episode.actions
            h5[f"rewards_{i}"], h5[f"terminated_{i}"] = episode.rewards[:, None], bool(episode.terminated[-1])
        h5["version"] = "2.1"
    for name in ("v1.h5", "v2.h5"):
        assert_same(read(tmp_path / name), data)


@pytest.mark.filterwarnings("ignore::UserWarning:minari")
@pytest.mark.parametrize("data_format", ["hdf5", "arrow"])
def test_minari(data_format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    data = terminated(make_episodes(LENGTHS))
    buffers = [
        EpisodeBuffer(
            observations=np.concatenate([episode.observations, np.full((1, 3), i, np.float32)]),
            actions=episode.actions,
            rewards=episode.rewards.astype(np.float64),
            terminations=episode.terminated,
            truncations=episode.truncated,
        )
        for i, episode in enumerate(episodes_of(data))
    ]
    minari.create_dataset_from_buffers(
        dataset_id="tests/log-v0",
        buffer=buffers,
        observation_space=gym.spaces.Box(-np.inf, np.inf, (3,), np.float32),
        action_space=gym.spaces.Box(-2, 2, (1,), np.float32),
        data_format=data_format,
        author="",
        author_email="",
        code_permalink="",
        algorithm_name="",
        description="",
    )
    for path in (tmp_path / "tests/log-v0", "minari:tests/log-v0"):
        packed = read_dataset(DataConfig(path=str(path)))
        assert_same(packed, data)
        assert packed.final_observations is not None
        assert packed.final_observations[:, 0].tolist() == [0, 1, 2, 3]


def test_the_original_trajectories(tmp_path: Path) -> None:
    data = terminated(make_episodes(LENGTHS))
    trajectories = [
        {
            "observations": episode.observations,
            "next_observations": np.zeros_like(episode.observations),
            "actions": episode.actions,
            "rewards": episode.rewards,
            "terminals": episode.terminated,
        }
        for episode in episodes_of(data)
    ]
    (tmp_path / "hopper.pkl").write_bytes(pickle.dumps(trajectories, protocol=2))
    assert_same(read(tmp_path), data)


class Malicious:
    def __init__(self, planted: Path) -> None:
        self.planted = planted

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.planted,))


def test_pickles_run_nothing(tmp_path: Path) -> None:
    planted = tmp_path / "planted"
    (tmp_path / "log.pkl").write_bytes(pickle.dumps([{"observations": Malicious(planted)}]))
    with pytest.raises(DataError, match=r"log.pkl: it holds .*touch, which is not an array: pickles can run code"):
        read(tmp_path / "log.pkl")
    packed = base64.b64encode(lz4.frame.compress(pickle.dumps(Malicious(planted)))).decode()
    (tmp_path / "log.json").write_text(json.dumps({"type": "SampleBatch", "eps_id": [1], "obs": packed}))
    with pytest.raises(DataError, match="pickles can run code"):
        read(tmp_path / "log.json")
    assert not planted.exists()


def pack(array: np.ndarray) -> str:
    return base64.b64encode(lz4.frame.compress(pickle.dumps(array))).decode()


def test_rllib_json_lines_are_fragments_of_episodes(tmp_path: Path) -> None:
    data = make_episodes(LENGTHS)
    ids = np.repeat(data.episode_ids + 100, data.lengths)
    with (tmp_path / "output.json").open("w") as file:
        for begin in range(0, data.num_transitions, 4):
            rows = slice(begin, begin + 4)
            batch = {"type": "SampleBatch", "obs": pack(data.observations[rows]), "eps_id": ids[rows].tolist()}
            batch |= {"actions": data.actions[rows].tolist(), "rewards": data.rewards[rows].tolist()}
            batch |= {"dones": [False] * len(ids[rows]), "infos": [{}] * len(ids[rows])}
            file.write(json.dumps(batch) + "\n")
    assert_same_episodes(read(tmp_path), data)


def test_rllib_rows_may_be_packed(tmp_path: Path) -> None:
    data = make_episodes(LENGTHS)
    rows = {
        "eps_id": [f"{i}" for i in np.repeat(data.episode_ids, data.lengths)],
        "obs": [pack(observation) for observation in data.observations],
        "actions": list(data.actions),
        "rewards": data.rewards,
        "terminateds": data.terminated,
        "truncateds": data.truncated,
    }
    pq.write_table(pa.table(rows), tmp_path / "rows.parquet")
    assert_same_episodes(read(tmp_path), data)


def rllib_fragment(data: TransitionDataset, begin: int, end: int, *, lookback: int) -> bytes:
    """A piece of an episode as RLlib's SingleAgentEpisode packs it."""

    def steps(values: np.ndarray, *, extra: int = 0) -> dict[str, Any]:
        return {"data": [nd(each) for each in values[begin - lookback : end + extra]], "lookback": lookback}

    def nd(value: Any) -> dict[bytes, Any]:
        value = np.asarray(value)
        return {b"nd": True, b"type": value.dtype.str, b"kind": b"", b"shape": value.shape, b"data": value.tobytes()}

    observations = np.concatenate([data.observations, np.zeros((1, 3), np.float32)])
    state = {"id_": f"{data.episode_ids[0]}", "t_started": begin, "observations": steps(observations, extra=1)}
    state |= {"actions": steps(data.actions), "rewards": {"data": data.rewards[begin - lookback : end].tolist()}}
    state["rewards"]["lookback"] = lookback
    whole = end == data.num_transitions
    state |= {"is_terminated": whole and bool(data.terminated[-1]), "is_truncated": whole and bool(data.truncated[-1])}
    return msgpack.packb(state)


def test_rllib_episodes_are_joined_from_their_fragments(tmp_path: Path) -> None:
    data = terminated(make_episodes(LENGTHS))
    pieces = []
    for episode in episodes_of(data):
        half = episode.num_transitions // 2
        pieces += [rllib_fragment(episode, 0, half, lookback=0)] if half else []
        pieces.append(rllib_fragment(episode, half, episode.num_transitions, lookback=half // 2))
    for number, part in enumerate((pieces[::2], pieces[1::2])):
        pq.write_table(pa.table({"item": pa.array(part, pa.binary())}), tmp_path / f"{number}.parquet")
    assert_same_episodes(read(tmp_path), data)


def write_lerobot(data: TransitionDataset, folder: Path, *, rewards: bool) -> None:
    columns = {"observation.state": list(data.observations), "action": data.actions[:, 0]}
    columns |= {"next.reward": data.rewards} if rewards else {}
    columns |= {"frame_index": data.timesteps, "episode_index": np.repeat(data.episode_ids, data.lengths)}
    (folder / "data/chunk-000").mkdir(parents=True)
    (folder / "meta/episodes/chunk-000").mkdir(parents=True)
    (folder / "meta/info.json").write_text('{"codebase_version": "v3.0"}')
    pq.write_table(pa.table(columns), folder / "data/chunk-000/file-000.parquet")
    pq.write_table(pa.table({"episode_index": data.episode_ids}), folder / "meta/episodes/chunk-000/file-000.parquet")


@pytest.mark.parametrize("version", ["v2.1, a file an episode", "v3"])
def test_lerobot_stores_vectors_of_one_number_as_numbers(version: str, tmp_path: Path) -> None:
    data = make_episodes(LENGTHS)
    write_lerobot(data, tmp_path, rewards=True)
    if version != "v3":
        file = tmp_path / "data/chunk-000/file-000.parquet"
        rows = pq.read_table(file)
        for i in range(data.num_episodes):
            of_episode = pc.equal(rows["episode_index"], i)
            pq.write_table(rows.filter(of_episode), file.with_name(f"episode_{i:06d}.parquet"))
        file.unlink()
    assert_same(read(tmp_path), data)


def test_a_log_without_rewards_says_what_follows(tmp_path: Path) -> None:
    write_lerobot(make_episodes(LENGTHS), tmp_path, rewards=False)
    with pytest.raises(DataError, match="no column for reward .* without rewards there is no return to reach"):
        read(tmp_path)


def test_imitations_trajectories_have_one_observation_more(tmp_path: Path) -> None:
    data = make_episodes(LENGTHS)
    observations = [np.concatenate([each.observations, np.ones((1, 3))]) for each in episodes_of(data)]
    np.savez(
        tmp_path / "rollouts.npz",
        obs=np.concatenate(observations).astype(np.float32),
        acts=data.actions,
        rews=data.rewards.astype(np.float64),
        infos=np.array([{}] * data.num_transitions),
        indices=data.ends[:-1],
        terminal=np.zeros(len(LENGTHS), dtype=bool),
    )
    packed = read(tmp_path)
    assert_same(packed, data)
    assert packed.final_observations is not None
    assert (packed.final_observations == 1).all()


def test_what_is_no_log_is_refused_by_name(tmp_path: Path) -> None:
    for name, content, message in (
        ("a.hdf5", b"no hdf5", "a.hdf5 is not a readable HDF5 file"),
        ("a.npz", b"no zip", "a.npz is no NPZ of plain arrays"),
        ("a.csv", b"", "a.csv is not a readable CSV file"),
        ("a.json", b'{"type": "other"}', "line 1 is no SampleBatch of RLlib"),
        ("a.json", b"{", "line 1 is no JSON"),
        ("a.pkl", b"no pickle", "a.pkl: it is no pickle of arrays"),
        ("b.pkl", pickle.dumps({}), "holds a dict, not a list of trajectories"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=message):
            read(tmp_path / name)
    with pytest.raises(DataError, match="data.format: one of minari, lerobot, parquet"):
        read(tmp_path, format="d4rl")

"""What makes a log look wrong is named with what mends it; sound logs of every kind raise no suspicion."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.examples import make_episodes, tiny_overrides, write_episodes

from dt_ray.cli.data import main as data_main
from dt_ray.config.loading import load_config
from dt_ray.config.schema import RunConfig
from dt_ray.data import TransitionDataset, read_dataset, returns_to_go
from dt_ray.data.description.traps import all_traps
from dt_ray.data.logs.files import find_files
from dt_ray.data.ranges import Ranges
from dt_ray.data.spaces import SpaceSpec
from dt_ray.errors import DataError
from dt_ray.jobs.training import name_run, start_run
from dt_ray.training.file_facts import FileFacts
from dt_ray.training.resident import ResidentData
from dt_ray.training.stream_facts import StreamingData


def traps_of(data: TransitionDataset, env_id: str | None = None) -> str:
    return "\n".join(all_traps(data, None, env_id))


def ended(data: TransitionDataset, episodes: Sequence[int] | None = None) -> TransitionDataset:
    """These episodes, or all, said to be ended by the environment."""
    chosen = data.ends[list(range(data.num_episodes)) if episodes is None else list(episodes)] - 1
    terminated, truncated = data.terminated.copy(), data.truncated.copy()
    terminated[chosen], truncated[chosen] = True, False
    return replace(data, terminated=terminated, truncated=truncated)


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=12, unique=True),
    seed=st.integers(0, 99),
    scale=st.sampled_from([1e-3, 1.0, 1e5]),
    offset=st.sampled_from([0.0, 1.0, 100.0]),
    with_returns=st.booleans(),
    data=st.data(),
)
def test_sound_logs_raise_no_suspicion(
    lengths: list[int], seed: int, scale: float, offset: float, with_returns: bool, data: st.DataObject
) -> None:
    log = make_episodes(lengths, seed=seed)
    log = ended(log, data.draw(st.lists(st.sampled_from(range(len(lengths))), unique=True)))
    log = replace(
        log,
        observations=(scale * (log.observations + offset)).astype(np.float32),
        rewards=(scale * log.rewards).astype(np.float32),
    )
    if with_returns:
        log = replace(log, returns_to_go=returns_to_go(log.rewards, log.starts))
    assert traps_of(log) == ""


@pytest.mark.parametrize("env_id", ["Pendulum-v1", None])
def test_a_time_limit_at_another_step_than_the_environments_is_found(env_id: str | None) -> None:
    assert "7 episode(s) are said to be ended by the environment at step 199" in traps_of(
        ended(make_episodes([199] * 7)), env_id
    )
    mostly = ended(make_episodes([50] * 6 + [12, 31, 7]))
    assert "6 episode(s) are said to be ended by the environment at step 50" in traps_of(mostly, env_id)
    assert "data.time_limit=50" in traps_of(mostly, env_id)
    assert traps_of(mostly.with_time_limit(50), env_id) == ""
    assert traps_of(make_episodes([199] * 7), env_id) == ""  # cut there, as the log says


def test_a_step_short_of_the_limit_is_named_so_beside_episodes_that_ended_earlier() -> None:
    found = traps_of(ended(make_episodes([199] * 4 + list(range(20, 40)))), "Pendulum-v1")
    assert "one short of its limit of 200" in found
    assert "data.time_limit=199" in found
    assert traps_of(ended(make_episodes([199, *range(20, 40)])), "Pendulum-v1") == ""  # may be by chance


def test_episodes_past_the_environments_limit_are_found() -> None:
    found = traps_of(make_episodes([200, 201, 400]), "Pendulum-v1")
    assert "2 episode(s) are longer than the environment's limit of 200 steps, the longest has 400" in found


def test_ends_are_judged_over_all_files(tmp_path: Path) -> None:
    for number in range(6):
        write_episodes(ended(make_episodes([30], seed=number)), tmp_path / f"log/part-{number}.parquet")
    with pytest.raises(DataError, match=r"6 episode\(s\) are said to be ended by the environment at step 30"):
        data_main(["validate", str(tmp_path / "log"), "--workers", "0"])


@pytest.mark.parametrize("is_sparse", [False, True])
def test_rows_of_next_step_autoreset_are_found(is_sparse: bool) -> None:
    """A vector environment logged as its steps come: after an end, a row with the final observation and reward 0."""
    generator = np.random.default_rng(0)
    rows, starts, previous = [], [], None
    for _ in range(8):
        starts.append(len(rows))
        walk = np.cumsum(np.append(generator.uniform(-1, 1), np.full(12, 0.3)))
        if previous is not None:
            rows.append((previous, generator.uniform(-2, 2), 0.0))
        rewards = np.where(np.arange(12) == 11, 1.0, 0.0) if is_sparse else generator.normal(size=12)
        rows += list(zip(walk[:-1], generator.uniform(-2, 2, size=12), rewards, strict=True))
        previous = walk[-1]
    values = np.array(rows, np.float32)

    def log(kept: np.ndarray, starts: np.ndarray) -> TransitionDataset:
        return TransitionDataset(
            observations=values[kept, :1], actions=values[kept, 1:2], rewards=values[kept, 2], starts=starts
        )

    found = traps_of(log(np.arange(len(values)), np.array(starts)))
    assert "7 of 8 episodes begin with a row of reward 0" in found
    if not is_sparse:  # counted after the reset: the row is the last of its episode
        found = traps_of(log(np.arange(len(values)), np.array([0, *(start + 1 for start in starts[1:])])))
        assert "7 of 8 episodes end with a row of reward 0" in found
    real = np.setdiff1d(np.arange(len(values)), starts[1:])
    assert traps_of(log(real, np.arange(8) * 12)) == ""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda sums, rewards: sums / 1000, "they are 0.001 times those"),
        (lambda sums, rewards: sums * 0, "they are 0 at every step"),
        (lambda sums, rewards: sums - rewards, "they leave out the reward of their own step"),
        (lambda sums, rewards: sums + 7, "they are 7 more"),
        (lambda sums, rewards: np.roll(sums, 1), "they differ by"),
    ],
)
def test_returns_to_go_that_are_no_sums_of_rewards_are_found(change, message: str) -> None:
    data = make_episodes([9, 14, 5])
    sums = returns_to_go(data.rewards, data.starts)
    wrong = replace(data, returns_to_go=change(sums, data.rewards).astype(np.float32))
    assert message in traps_of(wrong)
    assert "data.return_source=rewards" in traps_of(wrong)


def test_training_warns_of_returns_to_go_that_are_no_sums(tiny_config: RunConfig, pendulum_spec: SpaceSpec) -> None:
    data = make_episodes([9, 14, 5])
    data = replace(data, returns_to_go=returns_to_go(data.rewards, data.starts, discount=0.9))
    (note,) = ResidentData.build(data, pendulum_spec, tiny_config).notes
    assert "data.discount=0.9" in note
    for settings in ({"discount": 0.9}, {"return_source": "rewards"}, {"return_source": "column"}):
        config = replace(tiny_config, data=replace(tiny_config.data, **settings))
        assert ResidentData.build(data, pendulum_spec, config).notes == ()


def test_discounted_returns_to_go_are_named_with_their_discount() -> None:
    data = make_episodes([40, 25])
    found = traps_of(replace(data, returns_to_go=returns_to_go(data.rewards, data.starts, discount=0.9)))
    assert "discounted by 0.9, which data.discount=0.9 says" in found


def test_returns_that_go_on_past_the_end_of_the_log_are_sums() -> None:
    data = make_episodes([9, 14])
    more = np.repeat([3.0, -1.0], [9, 14])
    assert traps_of(replace(data, returns_to_go=(returns_to_go(data.rewards, data.starts) + more).astype("f4"))) == ""


def clock(base: float, spread: float, num: int) -> np.ndarray:
    return (base + np.linspace(0, spread, num)).astype(np.float32)


IMPRECISE = {
    "a clock": (clock(1.7e9, 200, 30), "between 1.7e+09 and"),
    "a short clock": (clock(1.7e9, 20, 30), "is 1.7e+09 in every row"),
    "a long clock": (clock(1.7e9, 1e6, 30 * 300), "changes by 128 from row to row"),
    "a large offset": (clock(1e7, 2, 30), "has only"),
    "a tiny unit": (clock(0, 1e-8, 30), "is not normalised: give it in a smaller unit"),
}


@pytest.mark.parametrize("name", IMPRECISE)
def test_numbers_that_float32_cannot_tell_apart_are_told(
    name: str, tmp_path: Path, pendulum_spec: SpaceSpec, caplog: pytest.LogCaptureFixture
) -> None:
    column, message = IMPRECISE[name]
    data = make_episodes([len(column) // 3] * 3)
    data.observations[:, 1] = column
    assert message in traps_of(data)
    assert "observation dimension 1" in traps_of(data)
    path = write_episodes(data, tmp_path / "log/part.parquet").parent
    with pytest.raises(DataError, match="observation dimension 1"):
        data_main(["validate", str(path), "--workers", "0"])
    config = name_run(load_config("decision_transformer/pendulum", tiny_overrides(path, tmp_path)), "tiny")
    with caplog.at_level(logging.WARNING, logger="dt_ray"):
        start_run(replace(config, total_timesteps=1, model=replace(config.model, clamp_timesteps=True)))
    assert [record for record in caplog.records if message in record.getMessage()]


def test_resident_and_streaming_data_say_the_same(
    tmp_path: Path, tiny_config: RunConfig, pendulum_spec: SpaceSpec
) -> None:
    for number in range(3):
        data = make_episodes([10, 12], seed=number)
        data.observations[:, 2] += 1e7
        data.actions[:] = 1e-4 * data.actions
        if number == 1:
            data.rewards[3] = -1e20
        write_episodes(data, tmp_path / f"log/part-{number}.parquet")
    config = replace(tiny_config, data=replace(tiny_config.data, path=str(tmp_path / "log"), action_bounds="data"))
    files = [replace(file, index=i) for i, file in enumerate(find_files(config.data.path))]
    streaming = StreamingData.build(files, FileFacts(config, pendulum_spec))
    resident = ResidentData.build(read_dataset(config.data), pendulum_spec, config)
    assert streaming.notes == resident.notes
    assert len(resident.notes) == 2
    assert streaming.spec == resident.spec
    assert resident.spec.action_high[0] == pytest.approx(2e-4, rel=0.1)


def test_a_reward_that_swallows_the_others_is_found_and_spares_other_episodes() -> None:
    data = make_episodes([10] * 4)
    sums = returns_to_go(data.rewards, data.starts)
    data.rewards[25] = -1e20
    assert "a reward of size 1e+20 stands among rewards of about" in traps_of(data)
    others = np.r_[0:20, 30:40]
    np.testing.assert_allclose(returns_to_go(data.rewards, data.starts)[others], sums[others], rtol=1e-5, atol=1e-5)


def test_actions_that_use_a_sliver_of_the_bounds_are_found() -> None:
    spec = SpaceSpec(observation_dim=3, action_dim=1, action_low=(-1e6,), action_high=(1e6,))
    found = "\n".join(all_traps(make_episodes([30]), spec))
    assert "action dimension 0 lies between" in found
    assert "set data.action_bounds=data" in found


def test_columns_that_never_change_are_noted_by_their_names(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    data = make_episodes([10] * 3)
    data.observations[:, 2] = 5
    path = write_episodes(data, tmp_path / "log/part.parquet").parent
    data_main(["validate", str(path), "--workers", "0"])
    assert "note: the same at every step: observation dimension 2" in capsys.readouterr().out
    data.rewards[:] = 0
    write_episodes(data, path / "part.parquet")
    with pytest.raises(DataError, match="every reward is 0"):
        data_main(["validate", str(path), "--workers", "0"])


@given(st.integers(1, 300), st.integers(1, 5), st.integers(0, 99))
def test_ranges_are_the_smallest_and_largest_of_each_column(num: int, dimension: int, seed: int) -> None:
    data = make_episodes([num], observation_dim=dimension, seed=seed)
    expected = [data.observations.min(axis=0), data.observations.max(axis=0)]
    np.testing.assert_array_equal(Ranges.of(data).observations, expected)

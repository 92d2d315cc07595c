"""What a log holds is what is read: every step, in order, in its episode, with the kind of its end, in every shape."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.examples import make_episodes
from support.logs import EPISODE_WRITERS, NAMES, ROW_WRITERS, columns_of
from support.streamed import run_config, streamed

from dt_ray.cli.data import main as run_data
from dt_ray.config.schema import DataConfig
from dt_ray.data import TransitionDataset, read_dataset

DTYPES = ("float16", "float32", "float64")


@st.composite
def episodes(draw: st.DrawFn) -> TransitionDataset:
    """Random ones, each ended by the environment, by a time limit or by the end of the log."""
    lengths = draw(st.lists(st.integers(1, 40), min_size=1, max_size=6))
    data = make_episodes(
        lengths,
        observation_dim=draw(st.integers(1, 5)),
        action_dim=draw(st.integers(1, 5)),
        seed=draw(st.integers(0, 99)),
    )
    kinds = np.array(draw(st.lists(st.sampled_from("etl"), min_size=len(lengths), max_size=len(lengths))))
    dtype = draw(st.sampled_from(DTYPES))
    terminated, truncated = np.zeros(len(data.rewards), bool), np.zeros(len(data.rewards), bool)
    terminated[data.ends[kinds == "e"] - 1] = True
    truncated[data.ends[kinds == "t"] - 1] = True
    return replace(
        data,
        observations=data.observations.astype(dtype),
        actions=data.actions.astype(dtype),
        rewards=data.rewards.astype(dtype),
        terminated=terminated,
        truncated=truncated,
    )


def fingerprints(data: TransitionDataset) -> list[tuple[Any, ...]]:
    """Each episode's numbers and end, in an order of their own; one that has no end was cut by the end of the log."""
    return sorted(
        (
            part.observations.astype(np.float32).tobytes(),
            part.actions.astype(np.float32).tobytes(),
            part.rewards.astype(np.float32).tobytes(),
            bool(part.terminated[-1]),
            not part.terminated[:-1].any() and not part.truncated[:-1].any(),
        )
        for part in (data.select([i]) for i in range(data.num_episodes))
    )


def parts_of(data: TransitionDataset, num_files: int) -> list[TransitionDataset]:
    """Whole episodes for each file, counted anew in each."""
    parts = [data.select(chosen) for chosen in np.array_split(np.arange(data.num_episodes), num_files) if len(chosen)]
    return [replace(part, episode_ids=np.arange(part.num_episodes)) for part in parts]


class Log(NamedTuple):
    config: DataConfig
    data: TransitionDataset


@st.composite
def row_logs(draw: st.DrawFn) -> Any:
    """A function that writes a log with a row per step into a folder."""
    data, naming = draw(episodes()), draw(st.sampled_from(sorted(NAMES)))
    ids = draw(st.sampled_from([None, "numbers", "texts", "floats"]))
    container = draw(st.sampled_from(sorted(ROW_WRITERS)))
    has_starts = NAMES[naming][3][3] is not None
    if ids is None and not has_starts:  # then what has no end can only be the last of a file
        truncated = data.truncated | (~data.terminated & np.isin(np.arange(len(data.rewards)), data.ends - 1))
        data = replace(data, truncated=truncated)
    times = draw(st.sampled_from([None, "index", "seconds", "every4"])) if ids or not has_starts else None
    num_files = draw(st.integers(1, 3))
    shuffled = ids is not None and times is not None and container not in ("csv", "semicolon")
    seed = draw(st.none() | st.integers(0, 9)) if shuffled else None
    # Whose marks of starts stand in other rows than the first ones of episodes is not shuffled.
    seed = None if has_starts else seed

    def write(folder: Path) -> Log:
        for number, part in enumerate(parts_of(data, num_files)):
            columns = columns_of(part, naming=naming, ids=ids, times=times)
            if seed is not None:
                order = np.random.default_rng(seed).permutation(part.num_transitions)
                columns = {name: np.asarray(values)[order] for name, values in columns.items()}
            ROW_WRITERS[container](columns, folder / f"part-{number}")
        return Log(DataConfig(path=str(folder)), data)

    return write


@st.composite
def episode_logs(draw: st.DrawFn) -> Any:
    data, write_file = draw(episodes()), draw(st.sampled_from(list(EPISODE_WRITERS.values())))
    data = replace(
        data, truncated=data.truncated | (~data.terminated & np.isin(np.arange(len(data.rewards)), data.ends - 1))
    )
    num_files = draw(st.integers(1, 3))

    def write(folder: Path) -> Log:
        for number, part in enumerate(parts_of(data, num_files)):
            write_file(part, folder / f"part-{number}")
        return Log(DataConfig(path=str(folder)), data)

    return write


@settings(max_examples=60)
@given(row_logs() | episode_logs())
def test_episodes_in_every_shape_name_and_container_come_back_equal(write: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        config, data = write(Path(folder))
        assert fingerprints(read_dataset(config)) == fingerprints(data)


@settings(max_examples=15)
@given(row_logs() | episode_logs())
def test_an_imported_log_is_the_log(write: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (source := Path(folder) / "log").mkdir()
        config, data = write(source)
        out = f"{folder}/packed"
        run_data(["import", config.path, "--out", out, "--workers", "0"])
        packed = read_dataset(DataConfig(path=out))
        assert fingerprints(packed) == fingerprints(data)
        assert len(set(packed.episode_ids.tolist())) == data.num_episodes


@settings(max_examples=25)
@given(episode_logs())
def test_streaming_reads_the_episodes_of_resident_data(write: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        config, data = write(Path(folder))
        parts = streamed(config, data)
        resident = read_dataset(config)
        assert sum(part.num_transitions for part in parts) == data.num_transitions
        lengths = sorted(length for part in parts for length in part.lengths)
        assert lengths == sorted(resident.lengths)
        np.testing.assert_allclose(
            sorted(first for part in parts for first in part.to_go()[part.starts]),
            sorted(resident.episode_returns),
            rtol=1e-4,
            atol=1e-4,
        )


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("kind", ["rows", "whole", "groups"])
def test_windows_on_ray_are_cut_from_the_same_episodes(kind: str, tmp_path: Path) -> None:
    from dt_ray.distributed.data import window_dataset

    data = make_episodes([9, 30, 1, 5, 7, 21, 3])
    for number, part in enumerate(parts_of(data, 3)):
        if kind == "rows":
            columns = columns_of(part, naming="gymnasium", ids="numbers", times=None)
            ROW_WRITERS["parquet"](columns, tmp_path / f"part-{number}")
        else:
            EPISODE_WRITERS[kind](part, tmp_path / f"part-{number}")
    run = run_config(DataConfig(path=str(tmp_path)))
    windows = window_dataset(run).take_batch(10_000)
    assert len(windows["mask"]) == data.num_transitions
    first = windows["timesteps"][:, 0] == 0
    assert first.sum() == data.num_episodes
    np.testing.assert_allclose(
        np.sort(windows["returns_to_go"][first, 0]), np.sort(data.episode_returns), rtol=1e-4, atol=1e-4
    )
    held_out = replace(run, data=replace(run.data, validation_fraction=0.3))
    counts = [
        len(window_dataset(held_out, split=split).take_batch(10_000)["mask"]) for split in ("train", "validation")
    ]
    assert sum(counts) == data.num_transitions

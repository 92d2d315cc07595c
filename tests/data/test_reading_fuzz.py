"""Damaged logs: read with nothing lost, or refused by one message that names the file. Never a traceback."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.examples import make_episodes
from support.logs import EPISODE_WRITERS, NAMES, ROW_WRITERS, columns_of

from dt_ray.cli.data import main as run_data
from dt_ray.config.schema import DataConfig, RunConfig
from dt_ray.data import TransitionDataset, read_dataset
from dt_ray.errors import UserError
from dt_ray.jobs.training import name_run, start_run

NUM_BY_DEFAULT, NUM_AT_NIGHT, CHUNK = 200, 2400, 100


def write_json(columns: dict[str, Any], file: Path) -> Path:
    """RLlib's JSON lines of SampleBatch."""
    lists = {name: np.asarray(values).tolist() for name, values in columns.items()}
    names = {"observation": "obs", "action": "actions", "reward": "rewards", "episode_id": "eps_id", "timestep": "t"}
    batch = {names.get(name, f"{name}s"): values for name, values in lists.items()}
    file.with_suffix(".json").write_text(json.dumps({"type": "SampleBatch"} | batch) + "\n")
    return file.with_suffix(".json")


def mutate_columns(columns: dict[str, Any], random: np.random.Generator, *, even: bool) -> dict[str, Any]:
    """The columns with one of them or all of their rows changed; `even` keeps all as long as they were."""
    columns = {name: np.asarray(values) for name, values in columns.items()}
    name = str(random.choice(list(columns)))
    num = len(columns[name])
    kinds = ["drop", "rename", "retype", "shuffle", "repeat", "hole", "some", "swap", "none"]
    match random.choice(kinds if even else [*kinds, "longer", "shorter", "deeper", "scalar"]):
        case "drop":
            del columns[name]
        case "rename":
            columns[str(random.choice(["done", "x", "t", "rewards", "is_first", "Episode", "state", "obs_1"]))] = (
                columns.pop(name)
            )
        case "retype":
            kind = str(random.choice(["U8", "float16", "int8", "bool", "float64", "uint64", "S4"]))
            with np.errstate(all="ignore"), suppress(ValueError):
                columns[name] = columns[name].astype(kind)
        case "shuffle":
            order = random.permutation(num)
            columns = {each: values[order] for each, values in columns.items()}
        case "repeat":
            rows = np.sort(np.concatenate([np.arange(num), random.integers(num, size=random.integers(1, 9))]))
            columns = {each: values[rows] for each, values in columns.items()}
        case "hole":
            values = columns[name].astype(np.float64) if columns[name].dtype.kind in "fiub" else columns[name]
            if values.dtype.kind == "f":
                values = values.copy()
                values[random.integers(num)] = random.choice([np.nan, np.inf, 2.0, -1e30])
            columns[name] = values
        case "some":
            rows = np.flatnonzero(random.random(num) < random.choice([0.0, 0.1, 0.9]))
            columns = {each: values[rows] for each, values in columns.items()}
        case "swap":
            other = str(random.choice(list(columns)))
            columns[name], columns[other] = columns[other], columns[name]
        case "longer":
            columns[name] = np.concatenate([columns[name], columns[name][:1]])
        case "shorter":
            columns[name] = columns[name][:-1]
        case "deeper":
            columns[name] = np.stack([columns[name]] * int(random.integers(1, 3)), axis=int(random.integers(0, 2)))
        case "scalar":
            columns[name] = columns[name].reshape(-1)[:1].reshape(())
    return columns


def mutate_bytes(content: bytes, random: np.random.Generator) -> bytes:
    """Cut, with bits turned, with a part blank or missing, or with something behind it."""
    data = bytearray(content)
    begin = int(random.integers(len(data)))
    match random.choice(["cut", "bits", "blank", "gap", "more"]):
        case "cut":
            del data[begin:]
        case "bits":
            for at in random.integers(len(data), size=random.integers(1, 20)):
                data[at] ^= 1 << int(random.integers(8))
        case "blank":
            data[begin : begin + 64] = bytes(len(data[begin : begin + 64]))
        case "gap":
            del data[begin : begin + int(random.integers(1, 64))]
        case "more":
            data += bytes(random.integers(256, size=64, dtype=np.uint8))
    return bytes(data)


def damaged_log(seed: int, folder: Path) -> int | None:
    """Writes one; its number of rows, where that is known."""
    random = np.random.default_rng(seed)
    lengths = random.integers(1, 12, size=random.integers(2, 6)).tolist()
    data = make_episodes(lengths, seed=seed)
    by_env = data.ends[random.random(len(lengths)) < 0.5] - 1
    data.terminated[by_env], data.truncated[by_env] = True, False
    writers = {**ROW_WRITERS, "json": write_json, **EPISODE_WRITERS}
    kind = str(random.choice(list(writers)))
    if kind in EPISODE_WRITERS:
        file = EPISODE_WRITERS[kind](data, folder / "log")
    else:
        naming = "ours" if kind == "json" else str(random.choice(list(NAMES)))
        ids = random.choice([None, "numbers", "texts"]) if NAMES[naming][3][3] is None else "numbers"
        times = random.choice([None, "index", "seconds"])
        columns = columns_of(data, naming=naming, ids=ids, times=times)
        is_array = kind in ("npz", "hdf5", "pickle", "json")
        if random.random() < 0.75:
            columns = mutate_columns(columns, random, even=not is_array)
        else:
            file = writers[kind](columns, folder / "log")
            file.write_bytes(mutate_bytes(file.read_bytes(), random))
            return None
        try:
            writers[kind](columns, folder / "log")
        except Exception:  # what can't even be written is no log
            return damaged_log(seed + 10**6, folder)
        lengths_now = {len(values) for values in columns.values() if np.ndim(values)}
        return lengths_now.pop() if len(lengths_now) == 1 and not is_array else None
    if random.random() < 0.9:
        file.write_bytes(mutate_bytes(file.read_bytes(), random))
        return None
    return data.num_transitions


def attempts(log: Path, config: RunConfig) -> Iterator[Any]:
    yield lambda: run_data(["describe", str(log), "--workers", "0"])
    yield lambda: run_data(["validate", str(log), "--env", "Pendulum-v1", "--workers", "0"])
    yield lambda: start_run(name_run(config, "fuzz"))


def assert_safe(seed: int, folder: Path, tiny: RunConfig) -> bool:
    """Whether the log of this seed could be read."""
    log = folder / f"log-{seed}"
    log.mkdir()
    num_rows = damaged_log(seed, log)
    settings = replace(tiny.data, path=str(log), validation_fraction=0.0)
    optim = replace(tiny.optim, warmup_steps=0)
    run = replace(tiny, data=settings, total_timesteps=1, storage_path=str(folder / f"runs-{seed}"), optim=optim)
    evaluation = replace(run.evaluation, num_episodes=1, max_timesteps=1, target_returns=(-100.0,), every=0)
    run = replace(run, evaluation=evaluation, checkpoint=replace(run.checkpoint, every=0))
    is_read = True
    for number, attempt in enumerate(attempts(log, run)):
        try:
            if number == 2 and not (is_read and seed % 10 == 0):  # a training takes longer than the rest together
                continue
            attempt()
        except UserError as error:
            is_read = is_read and number > 0
            if f"log-{seed}" not in str(error):
                raise AssertionError(f"seed {seed}: the file is not named in: {error}") from error
        except Exception as error:
            raise AssertionError(f"seed {seed}, attempt {number}: {type(error).__name__}: {error}") from error
    if is_read and num_rows is not None:
        data: TransitionDataset = read_dataset(DataConfig(path=str(log)))
        assert data.num_transitions == num_rows, f"seed {seed}: {num_rows} rows became {data.num_transitions} steps"
    return is_read


@pytest.mark.parametrize("first", range(0, NUM_BY_DEFAULT, CHUNK))
def test_damaged_logs_are_read_whole_or_refused_by_name(first: int, tmp_path: Path, tiny_config: RunConfig) -> None:
    read = [assert_safe(seed, tmp_path, tiny_config) for seed in range(first, first + CHUNK)]
    assert 0 < sum(read) < CHUNK


@pytest.mark.nightly
@pytest.mark.parametrize("first", range(NUM_BY_DEFAULT, NUM_AT_NIGHT, CHUNK))
def test_many_damaged_logs_are_read_whole_or_refused_by_name(
    first: int, tmp_path: Path, tiny_config: RunConfig
) -> None:
    read = [assert_safe(seed, tmp_path, tiny_config) for seed in range(first, first + CHUNK)]
    assert 0 < sum(read) < CHUNK

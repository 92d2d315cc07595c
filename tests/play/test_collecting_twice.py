"""Two processes that write the same dataset: one is kept whole, and neither spoils the other's files."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.processes import WAIT_S

from dt_ray.config.schema import CollectConfig, RunConfig
from dt_ray.data import read_dataset
from dt_ray.data.spaces import SpaceSpec
from dt_ray.errors import DataError
from dt_ray.jobs.dataset import make_dataset
from dt_ray.play.collection import CollectionPlan, collect_here, write_dataset

LENGTH = 3


@pytest.fixture(scope="module")
def tables() -> dict[int, list[pa.Table]]:
    """Datasets by their number of files, an episode each."""
    plans = {num: CollectionPlan(env_id="Pendulum-v1", behavior="random", num_episodes=1, seed=100_000 + num,
                                 max_timesteps=LENGTH) for num in (1, 2, 3)}  # fmt: skip
    return {num: list(collect_here(plan)) * num for num, plan in plans.items()}


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    at=st.integers(0, 3),
    sizes=st.permutations([1, 2, 3]),
    outer_overwrites=st.booleans(),
    inner_overwrites=st.booleans(),
)
def test_a_write_within_a_write_destroys_nothing(
    tmp_path: Path, tables: dict[int, list[pa.Table]], at: int, sizes: list[int], outer_overwrites: bool,
    inner_overwrites: bool,
) -> None:  # fmt: skip
    """The second one begins and ends after so many files of the first."""
    out = tmp_path / "data"
    shutil.rmtree(out, ignore_errors=True)
    outer, inner = sizes[:2]

    def written_meanwhile() -> Iterator[pa.Table]:
        for count, table in enumerate([*tables[outer], None]):
            if count == min(at, outer):
                write_dataset(str(out), tables[inner], source="inner", overwrite=inner_overwrites)
                assert len(list(out.iterdir())) == inner
            if table is not None:
                yield table

    if outer_overwrites:
        write_dataset(str(out), written_meanwhile(), source="outer", overwrite=True)
    else:
        with pytest.raises(DataError, match="written by another process meanwhile"):
            write_dataset(str(out), written_meanwhile(), source="outer")
    assert len(list(out.iterdir())) == (outer if outer_overwrites else inner)
    assert {path.name for path in tmp_path.iterdir()} == {"data", "data.README.md"}


def test_two_commands_at_once_leave_one_whole_dataset(tmp_path: Path, pendulum_spec: SpaceSpec) -> None:
    command = [sys.executable, "-m", "dt_ray.data", "collect", "--env", "Pendulum-v1", "--behavior", "random"]
    command += ["--episodes", "3", "--seed", "100000", "--workers", "0", "--out", str(tmp_path / "data")]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    errors = [process.communicate(timeout=WAIT_S)[1] for process in processes]
    assert sorted(process.returncode for process in processes) == [0, 2]
    assert not any("Traceback" in error for error in errors)
    config = replace(RunConfig().data, path=str(tmp_path / "data"))
    assert read_dataset(config, pendulum_spec).num_episodes == 3
    assert {path.name for path in tmp_path.iterdir()} == {"data", "data.README.md"}


def test_a_run_takes_the_dataset_that_another_has_made_meanwhile(
    tiny_config: RunConfig, tmp_path: Path, tables: dict[int, list[pa.Table]]
) -> None:
    collect = CollectConfig(behavior="random", num_episodes=1, seed=100_000)
    config = replace(tiny_config, data=replace(tiny_config.data, path=str(tmp_path / "data"), collect=collect))

    def slowly(plan: CollectionPlan) -> Iterator[pa.Table]:
        write_dataset(str(tmp_path / "data"), tables[2], source="another")
        yield from tables[1]

    make_dataset(config, slowly)
    assert len(list((tmp_path / "data").iterdir())) == 2

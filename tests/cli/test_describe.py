"""What `python -m dt_ray.data describe` says of a log: its numbers are the log's, and its last line can be typed."""

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pytest
from support.commands import fail, succeed
from support.datasets import write_flat
from support.examples import make_episodes, write_episodes
from support.planted import make_log, plant

from dt_ray.data import TransitionDataset

LENGTHS = [9, 30, 12, 5, 7, 21, 3]


def describe(log: Path, *options: str, folder: Path) -> dict[str, Any]:
    succeed("data", "describe", str(log), "--json", "facts.json", *options, cwd=folder)
    return json.loads((folder / "facts.json").read_text())


def write_csv(file: Path, columns: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.csv.write_csv(pa.table(columns), file)


def write_runs(folder: Path, data: TransitionDataset, *, gap_in: int) -> None:
    """A file for each run of a machine, with a time every 15 minutes, and a wait of an hour in one of them."""
    for index in range(data.num_episodes):
        episode = data.select([index])
        minutes = 15 * np.arange(episode.num_transitions)
        minutes[40:] += 45 * (index == gap_in)
        start = np.datetime64("2026-03-01T00:00:00") + np.timedelta64(index, "D")
        inside, wall, outside, pressure = episode.observations.T
        write_csv(
            folder / f"hall-{index:03d}.csv",
            {
                "run": [f"run-{index:03d}"] * len(minutes),
                "time": start + minutes.astype("timedelta64[m]"),
                "inside": inside,
                "fahrenheit": inside * np.float32(1.8) + 32,
                "wall": wall,
                "outside": outside,
                "pressure": pressure,
                "heater": episode.actions[:, 0],
                "fan": episode.actions[:, 1],
                "reward": episode.rewards,
            },
        )


RUN_COLUMNS = (
    "--column", "episode_id=run", "--column", "timestep=time", "--column", "action=heater,fan",
    "--column", "observation=inside,fahrenheit,wall,outside,pressure",
)  # fmt: skip


@pytest.fixture(scope="module")
def hall(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = plant(make_log("heated_hall", 5, 40), {7: "stuck_sensor", 33: "shifted_rewards"}, np.random.default_rng(5))
    folder = tmp_path_factory.mktemp("hall")
    write_runs(folder / "runs", data, gap_in=12)
    return folder


@pytest.fixture(scope="module")
def hall_facts(hall: Path) -> dict[str, Any]:
    return describe(hall / "runs", *RUN_COLUMNS, "--out", "page", folder=hall)


@pytest.mark.parametrize("form", ["whole", "flat"])
def test_every_episode_and_step_is_counted_once(form: str, tmp_path: Path) -> None:
    data = make_episodes(LENGTHS)
    if form == "whole":
        for index in range(3):
            write_episodes(data.select(range(index, 7, 3)), tmp_path / f"log/{index}.parquet")
    else:
        write_flat(data, tmp_path / "log", num_files=3)
    found = describe(tmp_path / "log", folder=tmp_path)
    facts = found["facts"]
    assert (facts["episodes"], facts["steps"], facts["files"]) == (7, sum(LENGTHS), 3)
    assert (facts["terminated"], facts["truncated"], facts["no end"]) == (0, 7, 0)
    returns, lengths = found["quantiles"]
    assert (lengths["0%"], lengths["100%"]) == (3, 30)
    assert returns["mean"] == pytest.approx(data.episode_returns.mean(), rel=1e-4)
    assert sum(row["steps"] for row in found["best_decile"]) == sum(LENGTHS)
    rows = {row["column"]: row for row in found["columns"]}
    for name, values in (("observation dimension 1", data.observations[:, 1]), ("reward", data.rewards)):
        assert rows[name]["lowest"] == pytest.approx(values.min())
        assert rows[name]["highest"] == pytest.approx(values.max())
        assert rows[name]["mean"] == pytest.approx(values.mean(), abs=1e-5)
        assert rows[name]["std"] == pytest.approx(values.std(), rel=1e-4)


def test_ends_are_of_three_kinds(tmp_path: Path) -> None:
    steps = np.arange(12)
    write_csv(
        tmp_path / "log.csv",
        {
            "episode": steps // 3,
            "observation": steps * 0.5,
            "action": np.sin(steps),
            "reward": np.cos(steps),
            "terminated": steps == 2,
            "truncated": steps == 5,
        },
    )
    facts = describe(tmp_path / "log.csv", folder=tmp_path)["facts"]
    assert (facts["terminated"], facts["truncated"], facts["no end"]) == (1, 1, 2)


def test_constant_and_duplicate_columns_are_named(hall_facts: dict[str, Any]) -> None:
    notes = {row["column"]: row["note"] for row in hall_facts["columns"]}
    assert notes["column pressure"] == "the same at every step"
    assert notes["column fahrenheit"] == "column inside in another unit"
    assert notes["column inside"] == ""


def test_equal_columns_are_the_same_in_all_files(tmp_path: Path) -> None:
    data = make_episodes([20, 20], observation_dim=4)
    data.observations[:, 2] = data.observations[:, 0]
    data.observations[:20, 3] = data.observations[:20, 1]  # in the first file alone
    for index in range(2):
        write_episodes(data.select([index]), tmp_path / f"log/{index}.parquet")
    notes = [row["note"] for row in describe(tmp_path / "log", folder=tmp_path)["columns"]]
    assert notes[:4] == ["", "", "the same as observation dimension 0", ""]


def test_rates_and_gaps_come_from_the_clock(hall_facts: dict[str, Any]) -> None:
    (rates,) = hall_facts["rates"]
    assert rates["usual interval"] == 900
    assert rates["steps a second"] == pytest.approx(1 / 900)
    (gap,) = hall_facts["gaps"]
    assert gap == {"episode": "run-012", "after step": 39, "waits": 3600, "usually": 900, "file": "hall-012.csv"}


def test_outliers_are_named_as_the_log_names_them(hall_facts: dict[str, Any]) -> None:
    found = {row["episode"]: row for row in hall_facts["outliers"]}
    assert {"run-007", "run-033"} <= set(found)
    assert found["run-007"]["what"].startswith("stuck sensor")
    assert found["run-007"]["file"] == "hall-007.csv"
    assert found["run-033"]["what"].startswith("other rewards")


@pytest.mark.parametrize("first_id", [0, 30], ids=["each file counts from 0", "ids go on"])
def test_an_outlier_is_named_by_its_file(first_id: int, tmp_path: Path) -> None:
    data = plant(make_log("point_mass", 1, 60), {4: "spike", 47: "spike"}, np.random.default_rng(1))
    for index, ids in enumerate((np.arange(30), first_id + np.arange(30))):
        part = replace(data.select(30 * index + np.arange(30)), episode_ids=ids)
        write_episodes(part, tmp_path / f"log/{index}.parquet")
        write_flat(part, tmp_path / f"flat/{index}", num_files=1)
    for log, files in (("log", ("0.parquet", "1.parquet")), ("flat", ("0/000.parquet", "1/000.parquet"))):
        found = describe(tmp_path / log, folder=tmp_path)["outliers"]
        places = {(row["episode"], row["file"]) for row in found}
        assert {("4", files[0]), (f"{first_id + 17}", files[1])} <= places


def test_the_page_has_pictures_and_numbers(hall: Path, hall_facts: dict[str, Any]) -> None:
    page = (hall / "page" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    for name in ("episodes", "column_values", "action_values"):
        assert (hall / "page" / f"{name}.png").stat().st_size > 5_000
    for number in (f"{hall_facts['facts']['steps']}", "run-007", "hall-012.csv", "the same at every step"):
        assert number in page
    assert shlex.split(hall_facts["next"])[3] in page
    assert "run-033" in (hall / "page" / "outliers.csv").read_text()


def test_the_next_command_packs_many_text_files_and_can_be_typed(hall: Path, hall_facts: dict[str, Any]) -> None:
    words = shlex.split(hall_facts["next"])
    assert words[:4] == ["python", "-m", "dt_ray.data", "import"]
    assert "wrote 40 episodes" in succeed("data", *words[3:], cwd=hall)
    packed = describe(hall / "data" / "runs-packed", folder=hall)
    assert packed["facts"]["steps"] == hall_facts["facts"]["steps"]
    assert packed["next"] == f"python -m dt_ray.train data.path={hall / 'data' / 'runs-packed'}"


def test_the_next_command_has_the_settings_that_the_log_needs(tmp_path: Path) -> None:
    data = make_episodes([10] * 6)
    data.terminated[data.ends - 1] = True
    data.truncated[:] = False
    write_episodes(data, tmp_path / "log.parquet")
    out = succeed("data", "describe", "log.parquet", "--action-scale", "2", cwd=tmp_path)
    assert "data.time_limit=10 marks them as cut" in " ".join(out.split())
    assert out.splitlines()[-1] == (
        "python -m dt_ray.train data.path=log.parquet data.time_limit=10 data.action_scale=2.0"
    )


def test_an_environment_says_what_lies_outside_its_bounds(tmp_path: Path) -> None:
    data = make_episodes([20, 20])
    data.observations[:] = np.clip(data.observations, -1, 1)
    data.observations[3, 0], data.actions[[5, 30]] = 1.5, 2.5
    write_episodes(data, tmp_path / "log.parquet")
    assert "outside" not in describe(tmp_path / "log.parquet", folder=tmp_path)
    found = describe(tmp_path / "log.parquet", "--env", "Pendulum-v1", folder=tmp_path)
    outside = {row["column"]: row["steps outside"] for row in found["outside"]}
    assert outside == {"observation dimension 0": 1, "action dimension 0": 2}
    assert found["actions"][0]["bounds"] == "-2 .. 2"
    wrong = fail("data", "describe", "log.parquet", "--env", "MountainCarContinuous-v0", cwd=tmp_path)
    assert "observations have 3 dimension(s) where MountainCarContinuous-v0 has 2" in wrong


def test_the_terminal_shows_the_tables_and_ends_with_a_command(hall: Path) -> None:
    out = succeed("data", "describe", "runs", *RUN_COLUMNS, cwd=hall)
    for title in ("Returns and lengths", "Columns", "How much of the actions", "The best tenth", "Rates", "Gaps"):
        assert title in out
    assert re.search(r"episode run-007 of hall-007\.csv: stuck sensor, .*from step \d+ \(score", out)
    assert out.splitlines()[-1].startswith("python -m dt_ray.data import runs ")

"""Reports: their numbers are those of the runs, their pages need no other file."""

import csv
import io
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from support.reports import make_report

from dt_ray.config.schema import RunConfig
from dt_ray.errors import RunError
from dt_ray.jobs.training import start_run
from dt_ray.report import main
from dt_ray.reports.page import write_report
from dt_ray.reports.records import Group, aggregate_rows, improvement_rows, over_seeds, read_groups, stratified_interval
from dt_ray.runs.storage import Folder


def rows_of(file: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(file.read_text())))


@pytest.fixture
def runs(tiny_config: RunConfig) -> list[str]:
    """Two seeds of one setting, and one of another."""
    wider = replace(tiny_config, name="wider", model=replace(tiny_config.model, width=24))
    configs = [replace(tiny_config, name="seed-0"), replace(tiny_config, name="seed-1", seed=1), wider]
    return [start_run(config).run for config in configs]


def test_a_report_is_one_page_and_the_files_behind_it(runs: list[str], tmp_path: Path) -> None:
    files = write_report(runs, Folder.at(tmp_path / "out"))
    assert files[0] == "report.html"
    page = (tmp_path / "out/report.html").read_text()
    assert len(page) > 100_000
    assert re.findall(r'(?:src|href)="(?!data:)', page) == []
    assert {"seed-0, seed-1", "wider"} <= set(re.findall(r"<td>([^<]*)</td>", page))
    for name in (file for file in files if file.endswith(".png")):
        with Image.open(tmp_path / "out" / name) as image:
            assert min(image.size) > 300
            assert len(image.convert("RGB").getcolors(maxcolors=2**24) or []) > 10  # something is drawn


def test_the_tables_say_what_the_runs_say(runs: list[str], tmp_path: Path) -> None:
    write_report(runs, Folder.at(tmp_path / "out"))
    groups, _ = read_groups(runs)
    assert [(group.label, len(group.runs)) for group in groups] == [("seed-0, seed-1", 2), ("wider", 1)]
    aggregates = {(row["group"], float(row["target_return"])): row for row in rows_of(tmp_path / "out/aggregates.csv")}
    for group in groups:
        for target in group.last[0].targets:
            returns = [
                r for report in group.last for t in report.targets if t.target_return == target.target_return
                for r in t.episode_returns
            ]  # fmt: skip
            row = aggregates[group.label, target.target_return]
            assert float(row["mean"]) == pytest.approx(np.mean(returns))
            assert int(row["episodes"]) == len(returns)
    learning = rows_of(tmp_path / "out/learning.csv")
    losses = {(row["run"], row["step"]): row["train/loss"] for row in learning if row["train/loss"]}
    metrics = groups[0].runs[1].metrics
    assert [float(losses["seed-1", str(line["step"])]) for line in metrics] == [line["train/loss"] for line in metrics]


def test_the_command_reports_into_the_run(runs: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    main([runs[2], "--video"])
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == f"{runs[2]}/report/report.html"
    assert all(Path(line).stat().st_size > 0 for line in printed)
    animations = [line for line in printed if line.endswith(".gif")]
    assert len(animations) == 2  # a target each
    with Image.open(animations[0]) as animation:
        assert animation.n_frames == 20  # evaluation.max_timesteps
    assert any(line.endswith("traces.png") for line in printed)


def test_there_must_be_something_to_report_on(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="is no run"):
        write_report([str(tmp_path)], Folder.at(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_run_goes_without_its_dataset(tiny_config: RunConfig, tmp_path: Path) -> None:
    run = start_run(tiny_config).run
    text = Path(run, "config.yaml").read_text()
    Path(run, "config.yaml").write_text(text.replace(tiny_config.data.path, str(tmp_path / "gone")))
    assert "obedience.png" in write_report([run], Folder.at(tmp_path / "out"))


floats = st.floats(-1e4, 1e4, width=32)


@given(arrays(float, st.tuples(st.integers(1, 4), st.integers(2, 9)), elements=floats))
def test_the_interval_of_the_interquartile_mean_is_within_the_returns(returns: np.ndarray) -> None:
    low, high = stratified_interval(returns)
    assert returns.min() - 1e-6 <= low <= high <= returns.max() + 1e-6


def group_of(label: str, returns: np.ndarray) -> Group:
    """A group with nothing but episode returns, a row a seed."""

    class Evaluated:
        def __init__(self, row: np.ndarray) -> None:
            (target,) = make_report(1, row.mean()).targets
            targets = (replace(target, episode_returns=tuple(row.tolist())),)
            self.evaluations = [replace(make_report(1), targets=targets)]

    return Group(label=label, runs=[Evaluated(row) for row in returns])  # type: ignore[list-item]


@given(*(arrays(float, (2, 5), elements=st.integers(-3, 3).map(float)) for _ in range(2)))
def test_improvements_of_two_groups_add_up_to_one(one: np.ndarray, other: np.ndarray) -> None:
    rows = improvement_rows([group_of("one", one), group_of("other", other)])
    better = np.mean([(a > b) + 0.5 * (a == b) for a in one.ravel() for b in other.ravel()])
    assert rows[0]["better than other"] == pytest.approx(better)
    assert rows[0]["better than other"] + rows[1]["better than one"] == pytest.approx(1)


def test_the_interquartile_mean_leaves_out_a_quarter_at_each_end() -> None:
    (row,) = aggregate_rows([group_of("one", np.array([[1.0, 2, 3, 4, 5, 6, 7, 1000]]))])
    assert row["iqm"] == pytest.approx((3 + 4 + 5 + 6) / 4)


def test_a_curve_over_seeds_is_their_mean_with_students_interval() -> None:
    steps, means, half = over_seeds([{0: 1.0, 5: 2.0, 7: 9.0}, {0: 3.0, 5: 2.0}])
    assert steps.tolist() == [0, 5]
    assert means.tolist() == [2.0, 2.0]
    assert half is not None
    np.testing.assert_allclose(half, [12.706 * 1.0, 0], rtol=1e-3)  # t = 12.706, standard error = sqrt(2) / sqrt(2)

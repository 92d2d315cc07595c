"""A return that is no number is never written as such, and is never the best."""

from __future__ import annotations

import json
import math
import tempfile
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.environments import Constant, env_id
from support.quirky_environments import Tank
from support.reports import make_report

from dt_ray.cli.command import print_evaluation
from dt_ray.config.schema import EvaluationConfig
from dt_ray.errors import BrokenEnvironmentError
from dt_ray.play.evaluation import play
from dt_ray.runs.evaluation_report import EvaluationReport
from dt_ray.runs.folder import MetricsLog, RunFolder
from dt_ray.runs.storage import Folder
from dt_ray.runs.writing import to_json


def strict(text: str) -> Any:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


unusable = st.sampled_from([math.nan, math.inf, -math.inf])


@given(st.lists(st.one_of(st.floats(-1e3, 1e3), unusable), min_size=1, max_size=6))
def test_the_best_evaluation_is_the_best_of_those_with_numbers(means: list[float]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run = RunFolder(Folder.at(folder))
        for step, mean in enumerate(means, start=1):
            run.write_evaluation(make_report(step, mean))
            strict(run.evaluation(step).read_text())
        summary = run.write_summary(status="finished", step=len(means))
        written = strict((run.folder / "summary.json").read_text())
        usable = [mean for mean in means if math.isfinite(mean)]
        assert (summary["best"] is None) == (not usable)
        if usable:
            assert EvaluationReport.from_dict(summary["best"]).score == max(usable)
            assert written["best"]["targets"][0]["return_mean"] == max(usable)


def test_a_file_that_holds_nan_from_before_is_never_the_best(tmp_path: Any) -> None:
    run = RunFolder(Folder.at(tmp_path))
    run.evaluation(1).write_text(json.dumps(make_report(1, math.nan).to_dict()))
    run.write_evaluation(make_report(2, -900.0))
    best = run.best_evaluation()
    assert best is not None
    assert best.step == 2


def test_metrics_are_json_whatever_they_are(tmp_path: Any) -> None:
    file = Folder.at(tmp_path) / "metrics.jsonl"
    MetricsLog(file, resumed_at=0).write(1, {"train/loss": math.nan, "train/gradient_norm": math.inf, "x": 1.0})
    assert strict(file.read_text()) == {"step": 1, "train/loss": None, "train/gradient_norm": None, "x": 1.0}


plain = st.one_of(st.floats(), st.integers(), st.text(), st.none(), st.booleans())


@given(st.one_of(plain, st.lists(plain), st.dictionaries(st.text(), st.lists(plain))))
def test_any_plain_values_are_strict_json(value: Any) -> None:
    assert "value" in strict(to_json({"value": value}))


@pytest.mark.filterwarnings("ignore:overflow")
def test_returns_that_add_up_to_no_number_are_the_environments_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tank, "reward", lambda self: 1e308)
    config = EvaluationConfig(target_returns=(0.0,), num_episodes=1, max_timesteps=20)
    with pytest.raises(BrokenEnvironmentError, match="rewards .seed 0. whose sum is inf"):
        play(Constant(), env_id("Plain"), config, [0])


def test_a_run_with_unusable_evaluations_is_shown(capsys: pytest.CaptureFixture) -> None:
    print_evaluation(make_report(1, math.nan))
    assert "nan" in capsys.readouterr().out

"""The JSON form of an evaluation report, and which of several reports is the best."""

import json
import math
from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.reports import make_report

from dt_ray.runs.evaluation_report import EvaluationReport, TargetResult, best_of

numbers = st.one_of(st.floats(-1e6, 1e6), st.just(math.nan))
targets = st.builds(
    TargetResult,
    target_return=st.one_of(st.floats(-1e4, 1e4), st.just(math.inf)),
    return_mean=numbers,
    return_std=numbers,
    return_ci95=st.tuples(numbers, numbers),
    normalized_score=st.one_of(st.none(), st.floats(-1, 2)),
    episode_returns=st.lists(numbers, max_size=3).map(tuple),
    episode_lengths=st.lists(st.integers(1, 500), max_size=3).map(tuple),
)
reports = st.builds(
    EvaluationReport,
    step=st.integers(0, 10**6),
    env_id=st.one_of(st.none(), st.just("Pendulum-v1")),
    num_episodes=st.integers(0, 100),
    seed=st.integers(0, 100),
    wall_s=st.floats(0, 1e3),
    env_steps_per_s=st.floats(0, 1e6),
    targets=st.lists(targets, max_size=3).map(tuple),
)


@given(reports)
def test_a_report_is_the_same_after_its_json_form(report: EvaluationReport) -> None:
    again = EvaluationReport.from_json(report.to_json())
    assert repr(again) == repr(report)  # which shows NaN as equal
    assert repr(EvaluationReport.from_dict(report.to_dict())) == repr(report)
    assert repr(EvaluationReport.from_dict(json.loads(report.to_json()))) == repr(report)


def test_the_json_form_is_the_published_one() -> None:
    form = json.loads(make_report(7, -150.0, math.nan).to_json())
    assert list(form) == ["step", "env_id", "num_episodes", "seed", "wall_s", "env_steps_per_s", "targets"]
    assert form["targets"][1] == {
        "target_return": 0.0,
        "return_mean": None,
        "return_std": 0.0,
        "return_ci95": [None, None],
        "normalized_score": None,
        "episode_returns": [None],
        "episode_lengths": [20],
    }


def test_as_much_as_possible_is_max_in_json_and_the_highest_target_in_here() -> None:
    report = make_report(7, -150.0, -140.0)
    report = replace(report, targets=(replace(report.targets[1], target_return=math.inf), report.targets[0]))
    assert json.loads(report.to_json())["targets"][0]["target_return"] == "max"
    assert report.score == -140.0
    assert report.obedience_error == report.targets[1].obedience_error  # what nobody can obey does not count
    assert math.isnan(report.targets[0].obedience_error)


@given(st.lists(st.floats(-500, 0), min_size=1, max_size=30), st.floats(-500, 0))
def test_distances_are_of_episodes_and_not_of_their_mean(returns: list[float], target: float) -> None:
    one = replace(make_report(7, -150.0).targets[0], target_return=target, episode_returns=tuple(returns))
    median, most = one.distances
    distances = sorted(abs(each - target) for each in returns)
    assert distances[0] <= median <= most <= distances[-1]
    assert sum(each <= median for each in distances) >= len(distances) / 2


def test_the_dictionary_of_a_report_holds_lists_as_json_does() -> None:
    form = make_report(7, -150.0).to_dict()
    assert form == json.loads(json.dumps(form))


@pytest.mark.parametrize("missing", [field.name for field in fields(EvaluationReport) if field.name != "held_out"])
def test_a_report_without_one_of_its_parts_is_refused(missing: str) -> None:
    form: dict[str, Any] = make_report(7, -150.0).to_dict()
    del form[missing]
    with pytest.raises(ValueError, match=missing):
        EvaluationReport.from_dict(form)


def test_the_score_is_the_mean_at_the_highest_target_return() -> None:
    assert make_report(1, -50.0, -80.0, -120.0).score == -120.0
    assert make_report(1, -50.0, -80.0, -120.0).highest_mean == -50.0
    assert make_report(1, math.nan, -80.0).highest_mean == -80.0


def test_a_report_without_targets_has_no_score_and_is_never_the_best() -> None:
    empty = make_report(3, env_id=None)
    assert math.isnan(empty.score)
    assert math.isnan(empty.highest_mean)
    assert best_of([empty]) is None
    assert best_of([empty, make_report(4, -10.0)]) == make_report(4, -10.0)


def test_of_equal_reports_the_earliest_is_the_best() -> None:
    one = make_report(1, -10.0)
    assert best_of([make_report(0, -20.0), one, replace(one, step=2)]) is one

"""docs/extending.md as its reader follows it: its files, and its commands in their order."""

import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from support.commands import lines_of, run_lines, with_less_to_do
from support.examples import ROOT

from dt_ray.errors import ConfigError
from dt_ray.learners import learner_class

PAGE = (ROOT / "docs/extending.md").read_text()
SHORTER = {"python -m dt_ray.train name=mine": "total_timesteps=50 scaling.cpus_per_worker=1 evaluation.num_episodes=5"}


@pytest.mark.ray
@pytest.mark.no_cover  # tracing would slow the commands of a whole page
@pytest.mark.usefixtures("ray_cluster")
def test_a_log_an_environment_and_a_learner_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, content in re.findall(r"^```python file=(\S+)\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE):
        (tmp_path / name).write_text(content)
    monkeypatch.syspath_prepend(tmp_path)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    run_lines(with_less_to_do(lines_of(PAGE), SHORTER), cwd=tmp_path, environment={**os.environ, "PATH": path})
    assert (tmp_path / "linear.onnx").stat().st_size > 1_000
    for made in ("runs/mine/report/report.html", "policy.onnx"):
        assert (tmp_path / made).stat().st_size > 10_000
    summary = json.loads((tmp_path / "runs/linear/summary.json").read_text())
    assert (summary["step"], summary["algorithm"]) == (100, "my_learner:LinearLearner")
    assert np.isfinite(summary["last"]["targets"][0]["return_mean"])


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("cql", "one of decision_transformer, behavior_cloning, iql, world_model, or module:Class"),
        ("nowhere:X", "can't load"),
    ],
)
def test_an_unknown_learner_is_refused(name: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        learner_class(name)

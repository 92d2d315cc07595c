"""Environments of several kinds, by the same line: nothing but `env_id` and `data.path` says what is what."""

import importlib.util
from pathlib import Path

import pytest

from dt_ray import report, train
from dt_ray.cli.data import main as data_main
from dt_ray.data.spaces import make_env
from dt_ray.errors import UnsupportedSpaceError
from dt_ray.runs.folder import RunFolder
from dt_ray.runs.storage import Folder

PUBLISHED = ("Hopper-v5", "HalfCheetah-v5", "Walker2d-v5")
BOX2D = ("LunarLanderContinuous-v3", "BipedalWalker-v3")
SHORT = [
    "total_timesteps=3",
    "evaluation.every=0",
    "evaluation.num_episodes=1",
    "scaling.num_workers=0",
    "model.width=16",
]


@pytest.mark.slow
@pytest.mark.parametrize(
    "env_id", [*PUBLISHED, *BOX2D, "MountainCarContinuous-v0", "support.quirky_environments:Plain-v0"]
)
def test_an_environment_and_a_log_are_all_that_is_named(env_id: str, tmp_path: Path) -> None:
    if env_id in BOX2D:
        pytest.importorskip("Box2D")
    data, run = tmp_path / "data", tmp_path / "one"
    data_main(["collect", "--env", env_id, "--episodes", "6", "--workers", "0", "--out", str(data)])
    train.main([f"env_id={env_id}", f"data.path={data}", "name=one", f"storage_path={tmp_path}", *SHORT])
    report.main([str(run), "--out", str(tmp_path / "report")])
    found = RunFolder(Folder.at(run)).read_evaluations()[-1]
    config = RunFolder(Folder.at(run)).read_config()
    assert found.env_id == config.env_id == env_id
    spec = make_env(env_id).spec
    assert spec is not None
    assert config.evaluation.max_timesteps == (spec.max_episode_steps or config.model.max_timesteps)
    assert all((target.normalized_score is not None) == (env_id in PUBLISHED) for target in found.targets)


@pytest.mark.parametrize("env_id", BOX2D)
def test_a_missing_extra_is_named(env_id: str) -> None:
    if importlib.util.find_spec("Box2D") is None:
        with pytest.raises(UnsupportedSpaceError, match=r'pip install "dt-ray\[box2d\]"'):
            make_env(env_id)

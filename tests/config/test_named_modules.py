"""What lies beside a downloaded checkpoint is not run, whatever its files name, unless the user names it."""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from dt_ray import evaluate, export, serve, train
from dt_ray.api import DecisionTransformer
from dt_ray.cli import data
from dt_ray.config import modules
from dt_ray.config.schema import RunConfig
from dt_ray.errors import RunError
from dt_ray.jobs.offline import estimate_run
from dt_ray.jobs.training import resumed_config, start_run
from dt_ray.runs.checkpoint import FILES, FileFacts, load_learner, load_policy, read_facts
from dt_ray.runs.folder import RunFolder, checkpoint_at
from dt_ray.runs.storage import Folder

PAYLOAD = """
from pathlib import Path
import gymnasium
from gymnasium.envs.classic_control import PendulumEnv
from dt_ray.learners import DecisionTransformerLearner as Learner

Path(__file__).with_name("HAS RUN").touch()
gymnasium.register("Mine-v0", PendulumEnv, max_episode_steps=200)

def behave(observations):
    return observations[:, :1]
"""


@pytest.fixture
def downloaded(tiny_config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run with a module beside it, where Python finds it."""
    monkeypatch.setattr(modules, "_allowed", set())
    run = Path(start_run(tiny_config).run)
    (tmp_path / "payload.py").write_text(PAYLOAD)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "payload", raising=False)
    return run


def name_in_checkpoint(run: Path, **values: str) -> Folder:
    """Changes what the newest checkpoint and the run's configuration say, with a manifest that fits."""
    checkpoint = checkpoint_at(Folder.at(run))
    facts = json.loads((checkpoint / FILES[1]).read_text()) | values
    (checkpoint / FILES[1]).write_text(json.dumps(facts))
    state = json.loads((checkpoint / FILES[3]).read_text())
    state["config"] |= values
    (checkpoint / FILES[3]).write_text(json.dumps(state))
    manifest = {name: asdict(FileFacts.of((checkpoint / name).read_bytes())) for name in FILES}
    (checkpoint / "MANIFEST.json").write_text(json.dumps(manifest))
    text = (run / "config.yaml").read_text()
    for key, value in values.items():
        text = "\n".join(f"{key}: {value}" if line.startswith(f"{key}:") else line for line in text.splitlines())
    (run / "config.yaml").write_text(text + "\n")
    return checkpoint


NAMES = [{"algorithm": "payload:Learner"}, {"env_id": "payload:Mine-v0"}]


@pytest.mark.parametrize("names", NAMES)
def test_nothing_that_a_checkpoint_names_is_run(downloaded: Path, names: dict[str, str]) -> None:
    checkpoint = name_in_checkpoint(downloaded, **names)
    for load in (
        lambda: read_facts(checkpoint),
        lambda: load_policy(checkpoint),
        lambda: load_learner(checkpoint),
        lambda: DecisionTransformer.load(downloaded),
        lambda: DecisionTransformer.resume(downloaded),
        lambda: resumed_config(str(downloaded)),
    ):
        with pytest.raises(RunError, match="would run the module payload"):
            load()
    assert not (downloaded.parent.parent / "HAS RUN").exists()
    modules.allow_modules("payload")
    load_policy(checkpoint)
    assert resumed_config(str(downloaded)).algorithm == names.get("algorithm", "decision_transformer")


def test_a_dataset_is_not_collected_by_what_a_run_names(downloaded: Path) -> None:
    text = (downloaded / "config.yaml").read_text()
    collect = "collect: {behavior: 'payload:behave', num_episodes: 1, seed: 100000}"
    assert "collect: null" in text
    (downloaded / "config.yaml").write_text(text.replace("collect: null", collect))
    with pytest.raises(RunError, match="data.collect.behavior=payload:behave"):
        resumed_config(str(downloaded))


def test_no_dataset_is_made_by_what_a_run_names(downloaded: Path) -> None:
    before = RunFolder(Folder.at(downloaded)).read_config()
    text = (downloaded / "config.yaml").read_text()
    text = text.replace(f"path: {before.data.path}", "path: payload:make").replace("num_workers: 0", "num_workers: 1")
    (downloaded / "config.yaml").write_text(text)
    for read in (
        lambda: resumed_config(str(downloaded)),
        lambda: estimate_run(checkpoint_at(Folder.at(downloaded))),
    ):
        with pytest.raises(RunError, match="data.path=payload:make, which would run the module payload"):
            read()
    assert not (downloaded.parent.parent / "HAS RUN").exists()
    assert resumed_config(str(downloaded), ["data.path=payload:make"]).data.path == "payload:make"


def test_an_override_that_names_the_module_allows_it(downloaded: Path) -> None:
    name_in_checkpoint(downloaded, algorithm="payload:Learner")
    assert resumed_config(str(downloaded), ["algorithm=payload:Learner"]).algorithm == "payload:Learner"


@pytest.mark.parametrize("names", NAMES)
def test_the_commands_refuse_and_take_the_users_word(
    downloaded: Path, names: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name_in_checkpoint(downloaded, **names)
    place = str(downloaded)
    collect = ["collect", "--env", "Pendulum-v1", "--behavior", place, "--episodes", "1", "--seed", "100000"]
    for main, arguments in (
        (evaluate.main, [place]),
        (export.main, [place]),
        (serve.main, [place]),
        (train.main, ["--resume", place]),
        (data.main, [*collect, "--workers", "0", "--out", str(tmp_path / "data")]),
    ):
        with pytest.raises(RunError, match="--import payload"):
            main(arguments)
    assert not (tmp_path / "HAS RUN").exists()
    evaluate.main([place, "--import", "payload", "--episodes", "1", "--max-timesteps", "3"])
    assert "1 episodes a target" in capsys.readouterr().out

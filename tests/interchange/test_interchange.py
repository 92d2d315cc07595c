"""Exported policies act as the policies that they were made of, over whole episodes."""

import math
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support.examples import ROOT
from support.trained import MODELS, trained

from dt_ray.config.schema import RunConfig
from dt_ray.errors import UserError
from dt_ray.export import main
from dt_ray.interchange.exporting import export_policy, largest_difference, load_exported
from dt_ray.play.rollout import rollout
from dt_ray.runs.checkpoint import load_policy
from dt_ray.runs.folder import checkpoint_at
from dt_ray.runs.storage import Folder

pytestmark = pytest.mark.slow  # ONNX takes seconds to write

EXAMPLES = ROOT / "examples"


EXPORTS = [("step", "onnx"), ("iql", "onnx"), ("triplet", "torch"), ("band", "torch")]  # every layout and format once
MORE_EXPORTS = [
    pytest.param(kind, format, marks=pytest.mark.nightly)
    for kind in [*MODELS, "iql", "behavior_cloning"]
    for format in ("onnx", "torch")
    if (kind, format) not in EXPORTS
]


@pytest.mark.parametrize(("kind", "format"), [*EXPORTS, *MORE_EXPORTS])
def test_an_exported_policy_acts_as_the_policy(tiny_config: RunConfig, kind: str, format: str) -> None:
    """From the first step, with a context that grows, to beyond its length."""
    run = trained(
        tiny_config, MODELS.get(kind, tiny_config.model), kind if kind not in MODELS else "decision_transformer"
    )
    policy, _ = load_policy(checkpoint_at(Folder.at(run)))
    act = load_exported(export_policy(policy, format, {}), format)  # type: ignore[arg-type]
    for target in (-100.0, -500.0, *([math.inf] if kind == "head" else [])):
        difference = largest_difference(act, policy, "Pendulum-v1", target_return=target, seed=3, max_timesteps=20)
        assert difference < 1e-5


def test_an_exported_policy_takes_any_number_of_episodes(tiny_config: RunConfig) -> None:
    policy, _ = load_policy(checkpoint_at(Folder.at(trained(tiny_config, MODELS["step"]))))
    act = load_exported(export_policy(policy, "onnx", {}), "onnx")
    generator = np.random.default_rng(0)
    inputs = {
        "observations": generator.normal(size=(5, 4, 3)).astype(np.float32),
        "previous_actions": generator.uniform(-2, 2, size=(5, 4, 1)).astype(np.float32),
        "returns_to_go": generator.normal(size=(5, 4)).astype(np.float32),
        "timesteps": np.arange(4)[None].repeat(5, axis=0),
    }
    together = act(inputs)
    alone = [act({name: values[i : i + 1] for name, values in inputs.items()}) for i in range(5)]
    np.testing.assert_allclose(together, np.concatenate(alone), atol=1e-5)
    assert (np.abs(together) <= 2).all()


def test_the_command_writes_a_file_that_acts_without_dt_ray(
    tiny_config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trained(tiny_config, replace(MODELS["triplet"], max_timesteps=200))
    file = tmp_path / "policy.onnx"
    main([run, "--out", str(file)])
    assert "acts as the checkpoint does" in capsys.readouterr().out
    with pytest.raises(UserError, match="exists already"):
        main([run, "--out", str(file)])
    play = runpy.run_path(str(EXAMPLES / "act_with_onnx.py"))["main"]
    assert play(str(file), -100.0) < 0
    code = f"import sys; sys.modules['torch'] = sys.modules['dt_ray'] = None; sys.argv = ['x', {str(file)!r}, '-100']\n"
    code += f"import runpy; runpy.run_path({str(EXAMPLES / 'act_with_onnx.py')!r}, run_name='__main__')"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert process.stdout.startswith("return -")


@pytest.mark.parametrize("discount", [1.0, 0.95])
def test_the_example_tells_the_return_to_go_as_the_policy_does(
    tiny_config: RunConfig, tmp_path: Path, discount: float
) -> None:
    """Over an episode that is longer than those of the data, asked for less than they reached and for more."""
    config = replace(tiny_config, data=replace(tiny_config.data, discount=discount))
    run = trained(config, replace(MODELS["step"], max_timesteps=200))
    file = tmp_path / "policy.onnx"
    main([run, "--out", str(file)])
    play = runpy.run_path(str(EXAMPLES / "act_with_onnx.py"))["main"]
    policy, _ = load_policy(checkpoint_at(Folder.at(run)))
    for target in (-1000.0, -10.0):
        played = rollout(policy, "Pendulum-v1", seeds=[3], target_returns=[target], max_timesteps=200)
        assert play(str(file), target, seed=3) == pytest.approx(played.rewards.sum(), rel=1e-3)


def test_a_program_of_torch_export_carries_its_facts(tiny_config: RunConfig, tmp_path: Path) -> None:
    main([trained(tiny_config, MODELS["step"]), "--format", "torch", "--out", str(tmp_path / "policy.pt2")])
    extra = {"facts.json": ""}
    torch.export.load(str(tmp_path / "policy.pt2"), extra_files=extra)
    assert '"context_length": "4"' in extra["facts.json"]

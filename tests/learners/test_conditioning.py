"""The law of conditioning: what a policy is shown while it acts is what it was shown at that step of a logged episode.

A logged episode is replayed from its own first return-to-go, and the inputs of the model are those of the training
windows: for each learner, token layout, attention, discount and source of returns, live, served and exported.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.examples import make_episodes, tiny_overrides, write_episodes

from dt_ray.config.loading import load_config
from dt_ray.config.schema import RunConfig
from dt_ray.data import TransitionDataset
from dt_ray.data.returns import ReturnRecursion, bounds_by_timestep
from dt_ray.data.spaces import SpaceSpec
from dt_ray.interchange.exporting import INPUTS, ExportedPolicy, largest_difference
from dt_ray.jobs.training import start_run
from dt_ray.learners import make_learner
from dt_ray.learners.policies import DecisionTransformerPolicy
from dt_ray.models import WindowBatch
from dt_ray.play.sessions import Sessions
from dt_ray.runs.checkpoint import (
    load_learner,
    load_policy,
    pack_checkpoint,
    restore_learner,
    save_checkpoint,
    write_checkpoint,
)
from dt_ray.runs.folder import checkpoint_at
from dt_ray.runs.storage import Folder
from dt_ray.training.cutting import WindowCutter
from dt_ray.training.resident import ResidentData, ReturnNoise

LENGTHS = [12, 9, 12, 1, 7]
MODELS = {"step": "step", "triplet": "triplet", "band": "step", "head": "step", "head, band": "step"}
SHOWN = ("observations", "previous_actions", "returns_to_go", "timesteps")

CASES = pytest.mark.parametrize(
    ("kind", "algorithm", "source"),
    [
        *((kind, "decision_transformer", source) for kind in MODELS for source in ("rewards", "value")),
        *((kind, "behavior_cloning", "rewards") for kind in MODELS if "head" not in kind),
    ],
)
DISCOUNTS = pytest.mark.parametrize("discount", [1.0, 0.99, 0.9])


@pytest.fixture(scope="module")
def values_run(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A run of iql, whose values returns are counted from."""
    folder = tmp_path_factory.mktemp("values")
    write_episodes(logged_episodes(), folder / "data.parquet")
    overrides = [*tiny_overrides(folder / "data.parquet", folder), "algorithm=iql", "total_timesteps=2"]
    return newest_checkpoint(start_run(load_config("decision_transformer/pendulum", overrides)).run)


def newest_checkpoint(run: str) -> str:
    return str(checkpoint_at(Folder.at(run)))


def logged_episodes() -> TransitionDataset:
    """Some that the environment ended, some that were cut, with and without a word of what came next."""
    data = make_episodes(LENGTHS)
    terminated = np.zeros(data.num_transitions, bool)
    terminated[data.ends[[0, 3]] - 1] = True
    finals = np.full((len(LENGTHS), 3), np.nan, np.float32)
    finals[2] = 0.5
    return replace(data, terminated=terminated, truncated=data.truncated & ~terminated, final_observations=finals)


def conditioned(tmp_path: Path, *, kind: str, discount: float, algorithm: str, source: str, values: str) -> RunConfig:
    config = load_config("decision_transformer/pendulum", tiny_overrides(tmp_path / "none", tmp_path))
    data = replace(config.data, discount=discount, validation_fraction=0.0)
    if source == "value":
        data = replace(data, return_source="value", values=values)
    attention = "band" if "band" in kind else "window"
    # A window from an episode's first step holds all of it.
    model = replace(config.model, context_length=12, token_layout=MODELS[kind], attention=attention)
    model = replace(model, conditioning="head" if "head" in kind else "tokens")
    return replace(config, algorithm=algorithm, data=data, model=model)


class Shown:
    """What a policy's model is shown, from the first step to the newest one."""

    def __init__(self, model: Any) -> None:
        self.newest: list[WindowBatch] = []
        for name in ("predict_last_action", "predict_next_action"):
            setattr(model, name, self._noting(getattr(model, name)))

    def _noting(self, predict: Any) -> Any:
        def noting(windows: WindowBatch, *rest: Any, **options: Any) -> Any:
            self.newest.append(windows)
            return predict(windows, *rest, **options)

        return noting


def learned(config: RunConfig, data: ResidentData, folder: Path, spec: SpaceSpec) -> DecisionTransformerPolicy:
    """The policy of a checkpoint of a new learner."""
    learner, config = make_learner(config, spec, data.normalizer, data.values)
    save_checkpoint(Folder.at(folder), learner, config=config)
    policy, _ = load_policy(Folder.at(folder))
    assert isinstance(policy, DecisionTransformerPolicy)
    return policy


def training_windows(config: RunConfig, data: ResidentData, anchors: np.ndarray) -> WindowBatch:
    num = len(anchors)
    cutter = WindowCutter(data.train, "cpu", seed=0, batch_size=num, share=slice(0, num))
    windows = cutter.cut(cutter.find(anchors[None]), 0)
    conditioned = config.algorithm == "decision_transformer"
    return windows if conditioned else replace(windows, returns_to_go=torch.zeros_like(windows.returns_to_go))


def assert_shown(found: WindowBatch, windows: WindowBatch, row: int, step: int) -> None:
    """The newest step of what was shown, and all before it that is there, are steps of the window."""
    length = found.mask.shape[1]
    for name in SHOWN:
        expected = getattr(windows, name)[row, step + 1 - length : step + 1]
        torch.testing.assert_close(getattr(found, name)[0], expected, rtol=1e-4, atol=1e-5, msg=f"{name}, step {step}")


@CASES
@DISCOUNTS
def test_a_policy_is_shown_while_it_acts_what_it_was_shown_in_training(
    kind: str, discount: float, algorithm: str, source: str, tmp_path: Path, values_run: str, pendulum_spec: SpaceSpec
) -> None:
    config = conditioned(tmp_path, kind=kind, discount=discount, algorithm=algorithm, source=source, values=values_run)
    logged = logged_episodes()
    data = ResidentData.build(logged, pendulum_spec, config)
    windows, lengths = training_windows(config, data, data.train.bounds[:-1]), np.diff(data.train.bounds)
    policy = learned(config, data, tmp_path / "policy", pendulum_spec)
    exported, sessions, shown = ExportedPolicy(policy), Sessions(policy, pendulum_spec), Shown(policy.model)
    recursion = policy.normalizer.returns_while_acting(1.0)
    for row, (start, length) in enumerate(zip(logged.starts, lengths, strict=True)):
        steps = slice(start, start + length)
        observations, actions, rewards = logged.observations[steps], logged.actions[steps], logged.rewards[steps]
        target = float(windows.returns_to_go[row, 0]) / data.normalizer.return_scale
        policy.start(observations[:1], np.array([target]))
        name = sessions.start(observations[0].tolist(), target)
        to_go = [recursion.start(np.array([target]))]
        for step in range(length):
            shown.newest.clear()
            policy.act()
            sessions.act([name])
            with torch.no_grad():
                exported(*exported_inputs(observations, actions, to_go))
            assert len(shown.newest) == 3
            for found in shown.newest:
                assert_shown(found, windows, row, step)
            if step + 1 < length:
                policy.observe(actions[step : step + 1], rewards[step : step + 1], observations[step + 1 : step + 2])
                sessions.observe(name, observations[step + 1].tolist(), float(rewards[step]), actions[step].tolist())
                to_go.append(recursion.follow(to_go[-1], rewards[step : step + 1], step + 1))


def exported_inputs(observations: np.ndarray, actions: np.ndarray, to_go: list[np.ndarray]) -> list[torch.Tensor]:
    num = len(to_go)
    previous = np.concatenate([np.zeros_like(actions[:1]), actions[: num - 1]])
    columns = [observations[:num], previous, np.concatenate(to_go).astype(np.float32), np.arange(num)]
    assert len(columns) == len(INPUTS)
    return [torch.from_numpy(np.ascontiguousarray(each))[None] for each in columns]


@DISCOUNTS
@pytest.mark.parametrize("source", ["rewards", "value"])
@pytest.mark.parametrize("noise", [0.0, 3.0])
def test_what_is_left_between_the_returns_to_go_of_a_window_are_its_rewards(
    discount: float, source: str, noise: float, tmp_path: Path, values_run: str, pendulum_spec: SpaceSpec
) -> None:
    """From whatever step of an episode a window begins, and wherever it ends."""
    config = conditioned(
        tmp_path, kind="step", discount=discount, algorithm="decision_transformer", source=source, values=values_run
    )
    config = replace(
        config, model=replace(config.model, context_length=4), data=replace(config.data, return_noise=noise)
    )
    logged = logged_episodes()
    data = ResidentData.build(logged, pendulum_spec, config)
    anchors = np.arange(data.train.num_transitions)
    config = replace(config, optim=replace(config.optim, batch_size=len(anchors)))
    add_noise = ReturnNoise(config, data.normalizer, rank=0, world_size=1)
    windows = add_noise(training_windows(config, data, anchors), 0)
    to_go = windows.returns_to_go.numpy() / data.normalizer.return_scale
    episodes = np.searchsorted(data.train.bounds, anchors, side="right") - 1
    rows = (anchors - data.train.bounds[episodes] + logged.starts[episodes])[:, None] + np.arange(3)
    inside = windows.mask[:, 1:].numpy()
    assert inside.any(axis=0).all()
    left = to_go[:, :-1] - discount * to_go[:, 1:]
    np.testing.assert_allclose(left[inside], logged.rewards[rows[inside]], atol=1e-4)


def test_relabelled_returns_hold_at_the_newest_step_of_a_window(
    tmp_path: Path, values_run: str, pendulum_spec: SpaceSpec
) -> None:
    """There they are what they are in windows of a single step."""
    config = conditioned(
        tmp_path, kind="step", discount=1.0, algorithm="decision_transformer", source="value", values=values_run
    )
    longer, single = (
        ResidentData.build(
            logged_episodes(), pendulum_spec, replace(config, model=replace(config.model, context_length=length))
        )
        for length in (4, 1)
    )
    anchors = np.arange(longer.train.num_transitions)
    windows, alone = (training_windows(config, each, anchors) for each in (longer, single))
    newest = windows.mask.sum(dim=1) - 1
    found = windows.returns_to_go[torch.arange(len(anchors)), newest]
    torch.testing.assert_close(found, alone.returns_to_go[torch.from_numpy(anchors) + newest, 0])


@given(
    discount=st.floats(0.5, 0.999),
    rewards=st.lists(st.floats(-10, 10), min_size=1, max_size=400),
    target=st.floats(-1e6, 1e6),
)
def test_what_is_shown_stays_within_what_the_data_showed(discount: float, rewards: list[float], target: float) -> None:
    logged = np.linspace(-3, 5, 30).astype(np.float32)
    bounds = bounds_by_timestep([(logged, np.arange(30) % 10)], max_timesteps=8)
    assert bounds.shape == (2, 8)  # later timesteps share the last one
    assert bounds[:, 7].tolist() == [logged[7], logged[29]]
    recursion = ReturnRecursion(discount=discount, bounds=bounds)
    shown = recursion.start(np.array([target]))
    for step, reward in enumerate(rewards, start=1):
        low, high = bounds[:, min(step - 1, 7)]
        assert low <= shown[0] <= high
        shown = recursion.follow(shown, np.array([reward]), step)


@DISCOUNTS
def test_an_exported_policy_is_told_the_return_to_go_as_the_policy_is(
    discount: float, tiny_config: RunConfig, tmp_path: Path
) -> None:
    """Over whole episodes of the environment, also where more is asked for than any episode reached."""
    config = replace(tiny_config, data=replace(tiny_config.data, discount=discount), total_timesteps=4)
    policy, _ = load_policy(Folder.at(newest_checkpoint(start_run(config).run)))
    module = ExportedPolicy(policy)  # type: ignore[arg-type]

    def act(inputs: dict[str, np.ndarray]) -> np.ndarray:
        with torch.no_grad():
            return module(*(torch.from_numpy(np.ascontiguousarray(inputs[name])) for name in INPUTS)).numpy()

    for target in (-100.0, -20.0, 1000.0):
        assert largest_difference(act, policy, "Pendulum-v1", target_return=target, seed=3, max_timesteps=50) < 1e-5


def test_a_checkpoint_that_says_nothing_of_a_discount_has_none(tiny_config: RunConfig, tmp_path: Path) -> None:
    """As those that were written before policies knew of it: they act as they did, and their runs go on."""
    config = replace(tiny_config, data=replace(tiny_config.data, discount=0.9))
    place = newest_checkpoint(start_run(config).run)
    learner, _ = load_learner(Folder.at(place))
    assert learner.normalizer.discount == 0.9
    assert learner.normalizer.to_go_bounds.shape[1] > 1
    files = pack_checkpoint(learner, config=config, state={})
    facts = json.loads(files["policy/policy.json"])
    del facts["normalizer"]["discount"], facts["normalizer"]["to_go_bounds"]
    old = Folder.at(tmp_path / "old")
    write_checkpoint(old, files | {"policy/policy.json": json.dumps(facts).encode()})
    policy, _ = load_policy(old)
    assert isinstance(policy, DecisionTransformerPolicy)
    assert (policy.normalizer.discount, policy.normalizer.to_go_bounds.size) == (1.0, 0)
    restore_learner(old, learner)

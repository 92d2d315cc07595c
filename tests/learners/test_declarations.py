"""A learner declares what it needs; what does not go with that is refused in one message, whoever wrote the learner."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pytest
import torch
from annotated_types import Gt
from support.examples import make_episodes
from torch import nn

from dt_ray.config.loading import to_plain
from dt_ray.config.schema import IQLConfig, RunConfig
from dt_ray.data.normalizer import Normalizer
from dt_ray.data.spaces import SpaceSpec
from dt_ray.errors import ConfigError, UserError
from dt_ray.interchange.exporting import export_policy, largest_difference, load_exported
from dt_ray.jobs.sweep import run_sweep
from dt_ray.jobs.training import check_run, start_run
from dt_ray.learners import LEARNERS, check_settings, declaration_of, return_source_of, window_length_of
from dt_ray.learners.base import Declaration, ValueFunction
from dt_ray.learners.decision_transformer import DecisionTransformerLearner
from dt_ray.learners.iql import IQLLearner
from dt_ray.play.sessions import Sessions
from dt_ray.runs.checkpoint import load_learner, load_policy
from dt_ray.runs.folder import checkpoint_at
from dt_ray.runs.storage import Folder
from dt_ray.sweeps.config import configure
from dt_ray.sweeps.loading import decode_sweep
from dt_ray.training.resident import ResidentData, ResidentSource


class OwnValues(IQLLearner):
    """A learner of values of one's own, which trains on three steps."""

    declares = Declaration(
        window_length=3, returns="rewards", sections=("iql",), needs_next_steps=True, gives_values=True
    )

    def value_function(self) -> ValueFunction:
        return super().value_function()


class OwnTransformer(DecisionTransformerLearner):
    """One that does not count from values, whatever its parent does."""

    declares = Declaration()


@dataclass(frozen=True, kw_only=True)
class OwnSettings:
    slope: Annotated[float, Gt(0)] = 1.0
    kind: str = "plain"


class WithSettings(DecisionTransformerLearner):
    """One whose model depends on a setting of its own."""

    declares = Declaration(settings=OwnSettings)

    def __init__(self, config: RunConfig, *arguments: Any, **options: Any) -> None:
        super().__init__(config, *arguments, **options)
        self.settings = self.declares.read_settings(config)
        self.model.register_buffer("slope", torch.full((round(self.settings.slope),), 1.0))


class Undeclared(nn.Module):
    """Nothing but a name."""


class BarePolicy:
    """Acts, and shows nothing of how."""

    def start(self, observations: np.ndarray, target_returns: np.ndarray) -> None:
        self.num = len(observations)

    def act(self) -> np.ndarray:
        return np.zeros((self.num, 1), np.float32)


def configured(config: RunConfig, learner: type, **data: object) -> RunConfig:
    return replace(config, algorithm=f"{learner.__module__}:{learner.__name__}", data=replace(config.data, **data))


def test_every_packaged_learner_declares_itself() -> None:
    assert all(isinstance(learner.declares, Declaration) for learner in LEARNERS.values())  # type: ignore[attr-defined]
    assert declaration_of(RunConfig(algorithm=f"{__name__}:Undeclared")) == Declaration()


def test_a_learner_of_ones_own_says_what_its_windows_and_returns_are(
    tiny_config: RunConfig, pendulum_spec: SpaceSpec
) -> None:
    config = configured(tiny_config, OwnValues)
    assert window_length_of(config) == 3
    assert return_source_of(config) == "rewards"
    built = ResidentData.build(make_episodes([9, 30, 12]), pendulum_spec, config)
    assert ResidentSource(built, config).batch(0).mask.shape == (8, 3)
    assert window_length_of(tiny_config) == tiny_config.model.context_length


@pytest.mark.parametrize(
    ("learner", "data", "says"),
    [
        (OwnValues, {"return_source": "column"}, "takes rewards from returns-to-go"),
        (OwnValues, {"return_noise": 1.0}, "takes rewards from returns-to-go"),
        (OwnValues, {"window_length": 4}, "trains on windows of 3 steps, got 4"),
        (OwnTransformer, {"return_source": "value", "values": "x"}, "does not count returns from values"),
    ],
)
def test_settings_that_do_not_go_with_a_learner_are_refused(
    tiny_config: RunConfig, learner: type, data: dict, says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        check_settings(configured(tiny_config, learner, **data))


def test_a_setting_that_a_learner_ignores_is_refused_for_new_runs_alone(tiny_config: RunConfig) -> None:
    config = replace(tiny_config, iql=IQLConfig(temperature=3.0))
    with pytest.raises(ConfigError, match=r"iql\.temperature: decision_transformer does not read it"):
        check_run(config)
    check_run(config, is_new=False)
    check_run(replace(config, algorithm="iql"))
    check_run(configured(config, OwnValues))


@pytest.mark.parametrize(
    ("learner", "given", "says"),
    [
        (WithSettings, {"slope": -1.0}, r"algorithm_settings\.slope: .* got -1\.0"),
        (
            WithSettings,
            {"slop": 2.0},
            r"algorithm_settings\.slop: no such key; did you mean algorithm_settings\.slope\?",
        ),
        (OwnTransformer, {"slope": 2.0}, r"algorithm_settings: \S+:OwnTransformer has none of its own, got slope"),
    ],
)
def test_settings_of_ones_own_are_checked_like_all_others(
    tiny_config: RunConfig, learner: type, given: dict, says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        check_run(replace(configured(tiny_config, learner), algorithm_settings=given))


def test_settings_of_ones_own_are_in_the_checkpoint(tiny_config: RunConfig) -> None:
    config = replace(configured(tiny_config, WithSettings), algorithm_settings={"slope": 3.0})
    checkpoint = checkpoint_at(Folder.at(start_run(config).run))
    policy, facts = load_policy(checkpoint)
    assert facts.algorithm_settings == {"slope": 3.0}
    assert len(policy.model.slope) == 3  # type: ignore[attr-defined]
    assert load_learner(checkpoint)[0].settings == OwnSettings(slope=3.0)  # type: ignore[attr-defined]


def test_settings_of_ones_own_can_be_swept(tiny_config: RunConfig) -> None:
    config = to_plain(replace(configured(tiny_config, WithSettings), name="swept"))
    sweep = decode_sweep({"algorithm_settings.slope": {"grid": [1.0, 2.0]}}, config, (), default_name="x")
    chosen = [configure(sweep.base, each).algorithm_settings for each in sweep.trials().values()]
    assert chosen == [{"slope": 1.0}, {"slope": 2.0}]


def test_values_may_come_from_a_learner_of_ones_own(tiny_config: RunConfig) -> None:
    values = start_run(configured(replace(tiny_config, name="values"), OwnValues)).run
    counting = replace(tiny_config, data=replace(tiny_config.data, return_source="value", values=values))
    assert start_run(replace(counting, name="counting")).summary["status"] == "finished"


@pytest.mark.slow
@pytest.mark.parametrize("learner", [OwnValues, OwnTransformer])
def test_what_a_learner_of_ones_own_learned_is_exported_and_served(tiny_config: RunConfig, learner: type) -> None:
    policy, facts = load_policy(checkpoint_at(Folder.at(start_run(configured(tiny_config, learner)).run)))
    act = load_exported(export_policy(policy, "torch", {}), "torch")
    assert largest_difference(act, policy, "Pendulum-v1", target_return=-100.0, seed=3, max_timesteps=20) < 1e-5
    sessions = Sessions(policy, facts.spec)
    name = sessions.start([1.0, 0.0, 0.0], -100.0)
    policy.start(np.array([[1.0, 0.0, 0.0]], np.float32), np.array([-100.0]))
    np.testing.assert_allclose(sessions.act([name])[0], policy.act()[0], atol=1e-5)  # type: ignore[arg-type]


def test_a_policy_that_shows_no_model_is_refused_with_what_it_lacks(pendulum_spec: SpaceSpec) -> None:
    says = r"BarePolicy can be neither exported nor served: it has no model, normalizer, return_scale, history_length"
    with pytest.raises(UserError, match=says):
        export_policy(BarePolicy(), "torch", {})  # type: ignore[arg-type]
    with pytest.raises(UserError, match=says):
        Sessions(BarePolicy(), pendulum_spec)  # type: ignore[arg-type]


class Unreadable(nn.Module):
    """Chooses by its numbers, which no exporter follows."""

    def predict_last_action(self, windows: object) -> torch.Tensor:
        observations = windows.observations[:, -1]  # type: ignore[attr-defined]
        return observations[:, :1] if float(observations.sum()) > 0 else -observations[:, :1]


class UnreadablePolicy(BarePolicy):
    history_length, return_scale = 1, 0.0

    def __init__(self, normalizer: Normalizer) -> None:
        self.model, self.normalizer = Unreadable(), normalizer

    def observe(self, actions: np.ndarray, rewards: np.ndarray, observations: np.ndarray) -> None: ...

    def keep(self, episodes: object) -> None: ...


@pytest.mark.slow
def test_a_model_that_cannot_be_exported_is_named_in_one_sentence(pendulum_spec: SpaceSpec, tmp_path: Path) -> None:
    policy = UnreadablePolicy(Normalizer.fit(make_episodes([30]), pendulum_spec))
    with pytest.raises(UserError, match=r"torch\.export can't read the model of UnreadablePolicy: \S+"):
        export_policy(policy, "torch", {})


def test_the_trials_of_a_sweep_are_checked_by_their_own_learners(tiny_config: RunConfig, tmp_path: Path) -> None:
    """Before a cluster is started; the sections of all of them may be set."""
    config = replace(tiny_config, iql=IQLConfig(temperature=3.0), data=replace(tiny_config.data, return_noise=1.0))
    sweep = decode_sweep(
        {"algorithm": {"grid": ["decision_transformer", "iql"]}},
        to_plain(config) | {"name": "both"},
        (),
        default_name="x",
    )
    with pytest.raises(ConfigError, match=r"^1 problem\(s\) in the configuration:\n  algorithm: iql takes rewards"):
        run_sweep(sweep)

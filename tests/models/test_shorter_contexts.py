"""A policy that sees fewer steps than its model was trained on acts alike wherever it is run."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from support.examples import make_episodes

from dt_ray.config.schema import ModelConfig, RunConfig
from dt_ray.data.normalizer import Normalizer
from dt_ray.data.spaces import SpaceSpec
from dt_ray.interchange.exporting import INPUTS, ExportedPolicy
from dt_ray.learners import LEARNERS
from dt_ray.learners.policies import DecisionTransformerPolicy
from dt_ray.play.sessions import Sessions

NUM_STEPS = 25


def make_policy(spec: SpaceSpec, model: ModelConfig, context_length: int | None) -> DecisionTransformerPolicy:
    config = RunConfig(model=model)
    config = replace(config, evaluation=replace(config.evaluation, context_length=context_length))
    learner = LEARNERS["decision_transformer"](config, spec, Normalizer.fit(make_episodes([30] * 4), spec))
    with torch.no_grad():
        for parameter in learner.model.parameters():  # far from its small beginnings, so that every step matters
            parameter.add_(torch.randn_like(parameter) * 0.3)
    policy = learner.policy()
    assert isinstance(policy, DecisionTransformerPolicy)
    return policy


@pytest.mark.parametrize("clamps", [False, True])
@pytest.mark.parametrize("attention", ["window", "band"])
@pytest.mark.parametrize("context_length", [1, 2, 3, 5, None])
def test_served_and_exported_policies_act_as_the_policy(
    pendulum_spec: SpaceSpec, attention: str, context_length: int | None, clamps: bool
) -> None:
    model = ModelConfig(
        context_length=5,
        num_layers=3,
        width=16,
        num_heads=2,
        attention=attention,  # type: ignore[arg-type]
        max_timesteps=7 if clamps else NUM_STEPS,
        clamp_timesteps=clamps,
    )
    policy = make_policy(pendulum_spec, model, context_length)
    exported, sessions = ExportedPolicy(policy), Sessions(policy, pendulum_spec)
    generator = np.random.default_rng(0)
    seen = generator.normal(size=(NUM_STEPS, 3)).astype(np.float32)
    rewards, target = generator.normal(size=NUM_STEPS), -100.0
    policy.start(seen[:1], np.array([target]))
    name = sessions.start(seen[0].tolist(), target)
    taken, to_go = [np.zeros(1, np.float32)], [target]
    for step in range(NUM_STEPS):
        action = policy.act()
        shown = policy.history_length
        inputs = {
            "observations": seen[: step + 1][-shown:][None],
            "previous_actions": np.stack(taken[-shown:])[None],
            "returns_to_go": np.array([to_go[-shown:]], np.float32),
            "timesteps": np.arange(step + 1)[-shown:][None],
        }
        with torch.inference_mode():
            written = exported(*(torch.from_numpy(inputs[each]) for each in INPUTS)).numpy()
        np.testing.assert_allclose(written, action, atol=1e-4)
        np.testing.assert_allclose(sessions.act([name])[0], action[0], atol=1e-4)
        if step + 1 < NUM_STEPS:
            policy.observe(action, rewards[step : step + 1], seen[step + 1 : step + 2])
            sessions.observe(name, seen[step + 1].tolist(), rewards[step], action[0].tolist())
            taken.append(action[0])
            to_go.append(to_go[-1] - rewards[step])
    assert len(taken) == NUM_STEPS


def test_the_model_of_a_learner_keeps_its_own_band(pendulum_spec: SpaceSpec) -> None:
    model = ModelConfig(context_length=5, num_layers=1, width=16, attention="band")
    learner = LEARNERS["decision_transformer"](
        RunConfig(model=model), pendulum_spec, Normalizer.fit(make_episodes([30] * 4), pendulum_spec)
    )
    DecisionTransformerPolicy(learner.model, learner.normalizer, context_length=2)
    assert learner.model.transformer.blocks[0].attention.band == 5

"""What the policy sees while it acts is what the model saw in training."""

import numpy as np
import pytest
import torch
from support.examples import make_episodes
from support.models import SPEC, as_float64, make_model

from dt_ray.data import Normalizer, returns_to_go, slice_windows
from dt_ray.errors import UserError
from dt_ray.learners.policies import DecisionTransformerPolicy
from dt_ray.models import WindowBatch

LAYOUTS = pytest.mark.parametrize("layout", ["step", "triplet", "head"])


@LAYOUTS
@pytest.mark.parametrize("context_length", [1, 3, 6])
def test_live_rollout_sees_what_training_saw(layout: str, context_length: int) -> None:
    """Replaying recorded episodes through the live context gives the training-time predictions, step by step."""
    data = make_episodes([20, 20, 20], action_dim=2)
    normalizer = Normalizer.fit(data, SPEC)
    model = make_model(layout).eval()
    policy = DecisionTransformerPolicy(model, normalizer, context_length=context_length)
    to_go = returns_to_go(data.rewards, data.starts)
    policy.start(data.observations[data.starts], to_go[data.starts])
    for step in range(20):
        rows = data.starts + step
        begin = max(0, step - context_length + 1)
        windows = slice_windows(data, data.starts + begin, length=step - begin + 1)
        with torch.inference_mode():
            trained = model.predict_actions(WindowBatch.from_windows(windows, normalizer))[:, -1]
        expected = normalizer.denormalize_actions(trained.numpy())
        np.testing.assert_allclose(policy.act(), expected, atol=1e-5, rtol=1e-5)
        if step < 19:
            policy.observe(data.actions[rows], data.rewards[rows], data.observations[rows + 1])


@pytest.mark.parametrize("context_length", [1, 3, 6])
def test_the_cache_gives_what_the_whole_episode_gives(context_length: int) -> None:
    """Under a band a kept key and value are those that computing the whole episode anew would give: no step is lost."""
    data = make_episodes([20, 20, 20], action_dim=2)
    normalizer = Normalizer.fit(data, SPEC)
    trained = make_model("step", attention="band", context_length=context_length).eval().double()
    policy = DecisionTransformerPolicy(make_model("step", attention="band").eval(), normalizer)
    policy.context_length = context_length
    whole = WindowBatch.from_windows(slice_windows(data, data.starts, length=20), normalizer)
    with torch.inference_mode():
        expected = normalizer.denormalize_actions(trained.predict_actions(as_float64(whole)).float().numpy())
    to_go = returns_to_go(data.rewards, data.starts)
    policy.start(data.observations[data.starts], to_go[data.starts])
    for step in range(20):
        rows = data.starts + step
        np.testing.assert_allclose(policy.act(), expected[:, step], atol=1e-5, rtol=1e-5)
        np.testing.assert_array_equal(policy.act(), policy.act())  # looking twice changes nothing
        if step < 19:
            policy.observe(data.actions[rows], data.rewards[rows], data.observations[rows + 1])


@pytest.mark.parametrize("attention", ["window", "band"])
def test_episodes_that_ended_do_not_change_the_others(attention: str) -> None:
    data = make_episodes([10, 10, 10], action_dim=2)
    normalizer = Normalizer.fit(data, SPEC)
    together, alone = (DecisionTransformerPolicy(make_model("step", attention=attention), normalizer) for _ in range(2))
    together.start(data.observations[data.starts], np.array([1.0, 2.0, 3.0]))
    alone.start(data.observations[data.starts[1:2]], np.array([2.0]))
    for step in range(9):
        live = [0, 1, 2] if step < 4 else [1]
        if step == 4:
            together.keep([1])
        np.testing.assert_allclose(together.act()[live.index(1)], alone.act()[0], atol=1e-5)
        rows = data.starts[live] + step
        together.observe(data.actions[rows], data.rewards[rows], data.observations[rows + 1])
        row = data.starts[1:2] + step
        alone.observe(data.actions[row], data.rewards[row], data.observations[row + 1])


def test_as_much_as_possible_is_asked_of_policies_that_know_how_much_that_is() -> None:
    data = make_episodes([20, 20, 20], action_dim=2)
    normalizer, starts = Normalizer.fit(data, SPEC), data.observations[data.starts]
    targets = np.array([-1.0, np.inf, np.inf])
    with pytest.raises(UserError, match="does not know how much a state can give"):
        DecisionTransformerPolicy(make_model("step"), normalizer).start(starts, targets)
    for layout, is_conditioned in (("head", True), ("step", False)):
        policy = DecisionTransformerPolicy(make_model(layout), normalizer, is_conditioned=is_conditioned)
        policy.start(starts, targets)
        for step in range(1, 4):
            assert np.isfinite(policy.act()).all()
            policy.observe(policy.act(), np.ones(3), data.observations[data.starts + step])


def test_actions_are_in_the_environments_units_and_bounds() -> None:
    data = make_episodes([10], action_dim=2)
    model = make_model("step")
    torch.nn.init.constant_(model.predict_action[0].bias, 10.0)  # every action at its upper bound
    policy = DecisionTransformerPolicy(model, Normalizer.fit(data, SPEC))
    policy.start(data.observations[:5], np.zeros(5))
    np.testing.assert_allclose(policy.act(), np.tile([2.0, 1.0], (5, 1)))

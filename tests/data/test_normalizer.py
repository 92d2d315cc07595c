"""The units of the model: one set of formulas, for arrays and for tensors."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from dt_ray.data.normalizer import Normalizer
from dt_ray.interchange.exporting import Units

floats = st.floats(-100, 100, width=32)


@given(
    observations=arrays(np.float32, (4, 2), elements=floats),
    actions=arrays(np.float32, (4, 3), elements=floats),
    low=arrays(np.float32, 3, elements=floats),
    width=arrays(np.float32, 3, elements=st.sampled_from([0.0, 0.5, 40.0])),
)
def test_an_exported_policy_has_the_units_of_the_checkpoint(
    observations: np.ndarray, actions: np.ndarray, low: np.ndarray, width: np.ndarray
) -> None:
    normalizer = Normalizer(
        observation_mean=np.array([0.5, -3], np.float32),
        observation_std=np.array([2, 0.1], np.float32),
        action_low=low,
        action_high=low + width,
        return_scale=1.0,
    )
    units = Units(normalizer)
    for name, values in (
        ("normalize_observations", observations),
        ("normalize_actions", actions),
        ("denormalize_actions", actions / 100),
    ):
        expected = getattr(normalizer, name)(values)
        assert expected.dtype == np.float32
        np.testing.assert_array_equal(getattr(units, name)(torch.from_numpy(values)).numpy(), expected)


def test_a_dimension_with_one_value_only_is_zero_and_comes_back() -> None:
    low = np.array([-1, 2], np.float32)
    normalizer = Normalizer(
        observation_mean=np.zeros(1, np.float32),
        observation_std=np.ones(1, np.float32),
        action_low=low,
        action_high=np.array([3, 2], np.float32),
        return_scale=1.0,
    )
    np.testing.assert_array_equal(normalizer.normalize_actions(np.array([[3.0, 2.0]])), [[1.0, 0.0]])
    np.testing.assert_array_equal(normalizer.denormalize_actions(np.array([[9.0, 9.0]])), [[3.0, 2.0]])

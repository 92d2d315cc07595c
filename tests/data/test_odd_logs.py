"""Logs of odd shapes are described without a warning from the arithmetic."""

import warnings
from dataclasses import replace

import numpy as np
import pytest
from support.examples import make_episodes

from dt_ray.data import TransitionDataset
from dt_ray.data.description.log_description import LogDescriber
from dt_ray.data.logs.files import DatasetFile


def still() -> TransitionDataset:
    data = make_episodes([5] * 20)
    return replace(data, observations=data.observations * 0, actions=data.actions * 0, rewards=data.rewards * 0)


LOGS = {
    "one step": lambda: make_episodes([1]),
    "single steps": lambda: make_episodes([1] * 30),
    "one episode": lambda: make_episodes([50]),
    "very different lengths": lambda: make_episodes([1, 2, 3, 40, 1, 1, 2, 50, 60, 3, 2, 1, 1, 1, 1]),
    "nothing moves": still,
    "huge numbers": lambda: replace(make_episodes([9] * 20), observations=make_episodes([9] * 20).observations * 1e15),
    "many columns": lambda: make_episodes([50] * 30, observation_dim=120, action_dim=10),
}


@pytest.mark.parametrize("name", LOGS)
def test_an_odd_log_is_described(name: str) -> None:
    data = LOGS[name]()
    describer = LogDescriber(path="log", columns={})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        describer.add(data)
        log = describer.finish([DatasetFile(index=0, path="/log", dataset="/log")], [None])
    assert log.facts["steps"] == data.num_transitions
    assert len(log.outliers) <= 0.05 * data.num_episodes + 1
    assert all(np.isfinite(outlier.score) for outlier in log.outliers)

"""Replaces returns-to-go by learned values, so that good steps of bad episodes count as good (Yamagata et al. 2023).

Legend: N transitions, S observation, R returns-to-go of windows.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray
from torch import nn

from dt_ray.config.schema import OptimConfig
from dt_ray.data.normalizer import Normalizer
from dt_ray.data.transitions import TransitionDataset
from dt_ray.data.windows import places_in_windows
from dt_ray.errors import ConfigError
from dt_ray.learners import declaration_of, givers_of_values
from dt_ray.models.state_values import StateValues
from dt_ray.runs.checkpoint import load_learner
from dt_ray.runs.storage import Folder

# Of (return-to-go - value) in the data: what a policy is asked for stays between these.
BOUND_QUANTILES = (0.001, 0.999)


class LearnedValues:
    """The state values that a checkpoint of a learner of values (`iql`) has learned, in the environment's units.

    Raises:
        RunError: there is no complete checkpoint.
        ConfigError: it is of another algorithm.
    """

    def __init__(self, checkpoint: str) -> None:
        learner, config = load_learner(Folder.at(checkpoint), optim=OptimConfig())  # on a CPU, without a compiler
        if not declaration_of(config).gives_values:
            raise ConfigError(
                f"data.values: a checkpoint of {givers_of_values()}, got one of {config.algorithm} at {checkpoint}"
            )
        self.normalizer = learner.normalizer
        self.network, self.config, self.scale = learner.value_function()  # type: ignore[attr-defined]

    @torch.no_grad()
    def __call__(self, observations: Float[ndarray, "N S"]) -> Float[ndarray, "N"]:
        normalized = torch.from_numpy(self.normalizer.normalize_observations(observations))
        return self.network(normalized)[:, 0].double().numpy() / self.scale

    def relabel(self, data: TransitionDataset, *, discount: float = 1.0) -> TransitionDataset:
        """The same steps with returns-to-go r + discount V(s'), or r where the environment ended the episode.

        These are used at the newest step of a window; the steps before it add the rewards up to there. The last step of
        a truncated episode is left out if the observation after it was not logged, as are episodes without other steps.
        """
        finals = data.final_observations
        known = data.terminated[data.ends - 1] | (False if finals is None else np.isfinite(finals).all(axis=1))
        next_values = np.append(self(data.observations)[1:], 0.0)
        next_values[data.ends - 1] = 0.0
        if finals is not None:
            cut = np.flatnonzero(known & ~data.terminated[data.ends - 1])
            next_values[data.ends[cut] - 1] = self(finals[cut])
        relabeled = replace(data, returns_to_go=(data.rewards + discount * next_values).astype(np.float32))
        return relabeled.without_last_steps(~known)

    def above(self, shown: TransitionDataset, *, length: int, discount: float) -> Float[ndarray, "R"]:
        """How far the returns-to-go in all windows of relabelled data are above the values of their states."""
        worth = self(shown.observations)
        places = places_in_windows(shown, length=length, discount=discount)
        return np.concatenate([returns - worth[rows] for rows, returns in places])

    def inside(self, normalizer: Normalizer, above: Float[ndarray, "R"]) -> StateValues:
        """The values in the units of a model, with bounds from what `above` has of the data that it is trained on."""
        values = StateValues(len(normalizer.observation_mean), self.config)
        values.network.load_state_dict(self.network.state_dict())
        first, last = values.network[0], values.network[-1]
        assert isinstance(first, nn.Linear)
        assert isinstance(last, nn.Linear)
        stretch = normalizer.observation_std / self.normalizer.observation_std
        shift = (normalizer.observation_mean - self.normalizer.observation_mean) / self.normalizer.observation_std
        with torch.no_grad():
            first.bias.add_(first.weight @ torch.from_numpy(shift))
            first.weight.mul_(torch.from_numpy(stretch))
            last.weight.mul_(normalizer.return_scale / self.scale)
            last.bias.mul_(normalizer.return_scale / self.scale)
        values.bounds.copy_(torch.from_numpy(np.quantile(above * normalizer.return_scale, BOUND_QUANTILES)))
        return values

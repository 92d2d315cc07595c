"""A world model as environments in which a policy is rolled out.

Legend: M members, N episodes, L those still live, S observation, A action dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from torch import Tensor

from dt_ray.data.normalizer import Normalizer
from dt_ray.environments.steps import Steps
from dt_ray.models.world_model import QUANTILES, WorldModel

MEDIAN = QUANTILES.index(0.5)


class LearnedEnvironments:
    """Episodes that begin at logged first observations and go on as the mean of some members predicts.

    The mean of members is far nearer to the truth over many steps than a member alone. Where the members disagree by
    more than `disagreement_limit` the log says nothing: the episode ends, with the median of the logged returns-to-go
    at that state as its last reward.
    """

    def __init__(
        self,
        model: WorldModel,
        normalizer: Normalizer,
        starts: Float[ndarray, "N S"],
        weights: Float[Tensor, "N M"],
        *,
        disagreement_limit: float,
        noise: Float[Tensor, "N"] | None = None,
    ) -> None:
        """`noise` adds so many standard deviations of the model's own errors to each step of an episode."""
        self.model, self.normalizer, self.starts, self.weights = model.eval(), normalizer, starts, weights
        self.noise = torch.zeros(len(starts)) if noise is None else noise
        self.action_shape = (len(normalizer.action_low),)
        self.disagreement_limit = disagreement_limit

    def reset(self, seeds: Sequence[int]) -> Float[ndarray, "N S"]:
        """Begins the episodes with these numbers, which are those of their starts."""
        self.numbers = np.asarray(seeds)
        begins = self.starts[self.numbers].astype(np.float32)
        self.observations = torch.as_tensor(self.normalizer.normalize_observations(begins))
        num = len(begins)
        self.timestep, self.random = 0, torch.Generator().manual_seed(0)
        self.disagreements: Float[ndarray, "N"] = np.zeros(num)  # summed over the steps
        self.is_cut: Bool[ndarray, "N"] = np.zeros(num, bool)
        self.cut_ranges: Float[ndarray, "N"] = np.zeros(num)  # of the returns that the log has where it was cut
        return begins

    @torch.inference_mode()
    def step(self, live: Int[ndarray, "L"], actions: Float[ndarray, "L A"]) -> Steps:
        before = self.observations[live]
        taken = torch.as_tensor(self.normalizer.normalize_actions(actions))
        episodes = torch.as_tensor(self.numbers[live])
        weights = self.weights[episodes].T  # [M, L]
        changes, rewards, stds, disagreements = predict_step(self.model, before, taken, weights)
        errors = torch.randn(before.shape, generator=self.random) * stds
        after = before + changes + self.noise[episodes, None] * errors
        logits = (weights * self.model.end_logits(self.all_members(after))).sum(dim=0)
        self.timestep += 1
        self.disagreements[live] += disagreements.numpy()
        cut = ~(disagreements <= self.disagreement_limit).numpy()  # also where they are not finite
        earned = rewards.double().numpy()
        if cut.any():
            earned[cut] = self._end_early(live[cut], before[torch.as_tensor(cut)])
            after[torch.as_tensor(cut)] = before[torch.as_tensor(cut)]
        self.observations[live] = after
        return Steps(
            observations=(after.numpy() * self.normalizer.observation_std + self.normalizer.observation_mean),
            rewards=earned / self.normalizer.return_scale,
            terminated=(logits > 0).numpy() | cut,
            truncated=np.zeros(len(live), bool),
        )

    @torch.inference_mode()
    def disagreements_at(
        self, observations: Float[ndarray, "L S"], actions: Float[ndarray, "L A"]
    ) -> Float[ndarray, "L"]:
        """How far the members are apart at these steps, which are in the environment's units."""
        before = torch.as_tensor(self.normalizer.normalize_observations(observations))
        taken = torch.as_tensor(self.normalizer.normalize_actions(actions))
        weights = torch.full((self.model.num_members, len(before)), 1 / self.model.num_members)
        return predict_step(self.model, before, taken, weights).disagreements.numpy()

    def close(self) -> None:
        pass

    def all_members(self, values: Float[Tensor, "L _"]) -> Float[Tensor, "M L _"]:
        return values.expand(self.model.num_members, *values.shape)

    def _end_early(self, episodes: Int[ndarray, "L"], observations: Float[Tensor, "L S"]) -> Float[ndarray, "L"]:
        """The returns-to-go that the log has at the last states that it knows."""
        timesteps = torch.full((len(observations),), self.timestep - 1)
        quantiles = self.model.return_quantiles(observations, timesteps).double().numpy()
        self.is_cut[episodes] = True
        self.cut_ranges[episodes] = (quantiles[:, -1] - quantiles[:, 0]) / self.normalizer.return_scale
        return quantiles[:, MEDIAN]


class PredictedStep(NamedTuple):
    """What several members predict together."""

    changes: Float[Tensor, "L S"]
    rewards: Float[Tensor, "L"]
    stds: Float[Tensor, "L S"]  # of the changes' errors, by what the members say of themselves
    disagreements: Float[Tensor, "L"]  # standard deviation over the members, relative to usual changes; the mean over S


def predict_step(
    model: WorldModel, observations: Float[Tensor, "L S"], actions: Float[Tensor, "L A"], weights: Float[Tensor, "M L"]
) -> PredictedStep:
    """Weighted means of the members' changes and rewards, how far off they may be, and how far apart they are."""
    members = model.num_members
    found = model(observations.expand(members, *observations.shape), actions.expand(members, *actions.shape))
    changes = (weights[..., None] * found.changes).sum(dim=0)
    rewards = (weights * found.rewards).sum(dim=0)
    variances = (weights[..., None] * (2 * found.log_stds[..., :-1]).exp()).sum(dim=0)
    spread = (found.changes / model.change_std).std(dim=0).mean(dim=-1)
    return PredictedStep(changes, rewards, variances.sqrt() * model.change_std, spread)

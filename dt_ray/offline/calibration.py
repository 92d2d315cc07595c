"""How well a world model foretells held-out episodes: what its estimates are judged by.

Legend: M members, N transitions, R replays, S observation.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray

from dt_ray.data.held_out import HeldOutEpisodes
from dt_ray.data.normalizer import Normalizer
from dt_ray.data.transitions import TransitionDataset
from dt_ray.models.world_model import WorldModel
from dt_ray.offline.learned_environments import LearnedEnvironments

REPLAY_STEPS = 25  # longer replays of logged actions say more about chaos than about the model
NUM_REPLAYS = 500
NUM_GROUPS = 5  # of replays, by the return-to-go at which they begin
NO_LIMIT = float("inf")


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What a world model does on held-out episodes."""

    disagreement: float  # of the members, a step: the mean
    high_disagreement: float  # the 99.9% quantile
    reward_error: float  # systematic error of the rewards of a step, after a few predicted ones


@torch.inference_mode()
def calibrate(model: WorldModel, normalizer: Normalizer, held_out: HeldOutEpisodes) -> Calibration:
    """Replays logged actions from random states of held-out episodes, `REPLAY_STEPS` at a time."""
    data = held_out.episodes
    random = np.random.default_rng(0)
    rows = np.sort(random.integers(data.num_transitions, size=NUM_REPLAYS))
    episodes = np.searchsorted(data.starts, rows, side="right") - 1
    lengths = np.minimum(data.ends[episodes] - rows, REPLAY_STEPS)
    envs = LearnedEnvironments(
        model,
        normalizer,
        data.observations[rows],
        torch.full((len(rows), model.num_members), 1 / model.num_members),
        disagreement_limit=NO_LIMIT,
    )
    envs.reset(range(len(rows)))
    live, predicted = np.arange(len(rows)), np.zeros(len(rows))
    for step in range(REPLAY_STEPS):
        live = live[lengths[live] > step]
        if not len(live):
            break
        outcome = envs.step(live, data.actions[rows[live] + step])
        predicted[live] += outcome.rewards
        live = live[~outcome.terminated]
    return Calibration(
        reward_error=_systematic_error(predicted - _logged_rewards(data, rows, lengths), rows, lengths, data),
        **_disagreements(envs, data),
    )


def _logged_rewards(data: TransitionDataset, rows: ndarray, lengths: ndarray) -> Float[ndarray, "R"]:
    sums = np.append(0.0, np.cumsum(data.rewards.astype(np.float64)))
    return sums[rows + lengths] - sums[rows]


def _systematic_error(errors: ndarray, rows: ndarray, lengths: ndarray, data: TransitionDataset) -> float:
    """The root mean square over groups of replays of the mean error of a step: what does not average out."""
    assert data.returns_to_go is not None
    order = np.argsort(data.returns_to_go[rows], kind="stable")
    groups = [part for part in np.array_split(order, NUM_GROUPS) if len(part)]
    return float(np.sqrt(np.mean([(errors[part].sum() / lengths[part].sum()) ** 2 for part in groups])))


def _disagreements(envs: LearnedEnvironments, data: TransitionDataset) -> dict[str, float]:
    found = envs.disagreements_at(data.observations, data.actions)
    return {"disagreement": float(found.mean()), "high_disagreement": float(np.quantile(found, 0.999))}

"""Fitted Q evaluation of policies that look at a history and are told a return: a rival of the world model's estimates.

A policy's state is what it sees: its window of a logged episode, with the returns-to-go that its target return would
have shown there. Its actions at all logged steps are therefore known beforehand (`replay`), and each is a function of
that window. The networks see the newest steps of it, what was earned up to there (the target return less the
return-to-go that is shown), and the share of the episode that is over. They learn the logged returns-to-go first, and
go on from there by r + Q(next window, the policy's action there), with target networks.

Legend: E episodes, N steps, M members, B steps of a batch, F features, A action dimension.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray
from torch import Tensor

from dt_ray.data.normalizer import Normalizer
from dt_ray.data.transitions import TransitionDataset
from dt_ray.learners.base import Policy
from dt_ray.models.world_model import make_ensemble
from dt_ray.play.held_out import replay

NUM_MEMBERS, WIDTH, NUM_STEPS_SEEN = 5, 128, 2
BATCH_SIZE, LEARNING_RATE = 256, 1e-3
NUM_FITS, NUM_UPDATES, COPY_EVERY = 500, 2000, 10  # to logged returns; by the recursion; between copies to the targets


@dataclass(frozen=True, kw_only=True)
class QEstimate:
    """What a policy will reach from the log's starts, by fitted Q evaluation."""

    estimate: float
    half_width: float  # of the 90% interval: of the members, which learn from bootstrapped episodes, and the starts
    disagreement: float  # of the members about the policy's actions, over that about the logged ones


def fitted_q(
    policy: Policy,
    log: TransitionDataset,
    normalizer: Normalizer,
    *,
    target_return: float,
    max_timesteps: int,
    seed: int = 0,
) -> QEstimate:
    """Fits the networks to all of the log's episodes for one policy and one target return."""
    steps = _Steps.of(policy, log, normalizer, target_return=target_return, max_timesteps=max_timesteps)
    torch.manual_seed(seed)
    random = np.random.default_rng(seed)
    networks = make_ensemble(NUM_MEMBERS, [steps.seen.shape[1] + steps.taken.shape[1], WIDTH, WIDTH, 1])
    targets, optimizer = copy.deepcopy(networks), torch.optim.Adam(networks.parameters(), lr=LEARNING_RATE, fused=True)
    num = NUM_FITS + NUM_UPDATES
    falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: min(1.0, 2 * (1 - done / num) + 0.01))
    drawn = [steps.bootstrapped(random) for _ in range(NUM_MEMBERS)]
    low, high = float(steps.returns.min()), float(steps.returns.max())
    for update in range(num):
        rows = torch.as_tensor(np.stack([each[random.integers(len(each), size=BATCH_SIZE)] for each in drawn]))
        wanted = steps.returns[rows]
        if update >= NUM_FITS:
            if (update - NUM_FITS) % COPY_EVERY == 0:
                targets.load_state_dict(networks.state_dict())
            with torch.no_grad():
                after = steps.values(targets, rows + steps.goes_on[rows].long(), steps.chosen).clamp(low, high)
            wanted = steps.rewards[rows] + steps.goes_on[rows] * after
        loss = (steps.values(networks, rows, steps.taken) - wanted).square().mean(dim=1).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        falling.step()
    return steps.estimate(networks)


@dataclass(frozen=True, kw_only=True)
class _Steps:
    """The logged steps as the networks see them; returns are in standard deviations of the log's returns-to-go."""

    seen: Float[Tensor, "N F"]
    taken: Float[Tensor, "N A"]
    chosen: Float[Tensor, "N A"]  # by the policy
    rewards: Float[Tensor, "N"]
    returns: Float[Tensor, "N"]  # to go, as logged
    goes_on: Float[Tensor, "N"]
    starts: ndarray
    episodes: ndarray  # of each step
    usable: ndarray  # rows: an episode's last step is one only where nothing comes after it
    scale: float

    @classmethod
    def of(
        cls,
        policy: Policy,
        log: TransitionDataset,
        normalizer: Normalizer,
        *,
        target_return: float,
        max_timesteps: int,
    ) -> _Steps:
        episodes, total = np.repeat(np.arange(log.num_episodes), log.lengths), log.episode_returns
        sums = np.cumsum(log.rewards.astype(np.float64)) - log.rewards
        earned = sums - sums[log.starts][episodes]
        to_go = total[episodes] - earned
        observations = normalizer.normalize_observations(log.observations)
        actions = normalizer.normalize_actions(log.actions)
        columns = [observations, earned[:, None] / np.ptp(total), log.timesteps[:, None] / max_timesteps]
        for back in range(1, NUM_STEPS_SEEN):
            rows, is_there = np.maximum(np.arange(len(to_go)) - back, 0), log.timesteps[:, None] >= back
            columns += [observations[rows] * is_there, actions[rows] * is_there]
        is_last = np.zeros(len(to_go), dtype=bool)
        is_last[log.ends - 1] = True
        ends = is_last & (log.terminated | (log.lengths[episodes] >= max_timesteps))
        scale = float(to_go.std())
        asked = replace(log, returns_to_go=np.full(len(to_go), target_return, np.float32))
        numbers = {
            "seen": np.concatenate(columns, axis=1),
            "taken": actions,
            "chosen": normalizer.normalize_actions(replay(policy, asked)),
            "rewards": log.rewards / scale,
            "returns": to_go / scale,
            "goes_on": ~is_last,
        }
        tensors = {name: torch.as_tensor(values.astype(np.float32)) for name, values in numbers.items()}
        usable = np.flatnonzero(~is_last | ends)
        return cls(**tensors, starts=log.starts, episodes=episodes, usable=usable, scale=scale)

    def bootstrapped(self, random: np.random.Generator) -> ndarray:
        """The rows of as many episodes as there are, drawn with replacement."""
        num = len(self.starts)
        counts = np.bincount(random.integers(num, size=num), minlength=num)
        return np.repeat(self.usable, counts[self.episodes[self.usable]])

    def values(self, networks: torch.nn.Module, rows: Tensor, actions: Float[Tensor, "N A"]) -> Float[Tensor, "M B"]:
        return networks(torch.cat([self.seen[rows], actions[rows]], dim=-1))[..., 0]

    @torch.no_grad()
    def estimate(self, networks: torch.nn.Module) -> QEstimate:
        from scipy.stats import t as student

        def of(rows: ndarray, actions: Tensor) -> Float[Tensor, "M B"]:
            return self.values(networks, torch.as_tensor(rows).expand(NUM_MEMBERS, -1), actions) * self.scale

        found, some = of(self.starts, self.chosen), self.usable[:: max(1, len(self.usable) // 5000)]
        means, by_start = found.mean(dim=1), found.mean(dim=0)
        parts = (
            student.ppf(0.95, NUM_MEMBERS - 1) * float(means.std()),
            student.ppf(0.95, 99) * float(by_start.std()) * math.sqrt(1 / len(by_start) + 1 / 100),
        )
        return QEstimate(
            estimate=float(means.mean()),
            half_width=math.hypot(*parts),
            disagreement=float(of(some, self.chosen).std(dim=0).mean() / of(some, self.taken).std(dim=0).mean()),
        )

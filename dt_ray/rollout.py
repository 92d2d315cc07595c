"""Episodes played by a policy in many environments at once: what evaluation and collection share.

Legend: N episodes, T the longest, S observation, A action dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray

from dt_ray.data.spaces import make_env
from dt_ray.data.transitions import TransitionDataset
from dt_ray.errors import UserError
from dt_ray.learners.base import Policy


@dataclass(frozen=True, kw_only=True)
class Rollouts:
    """What happened, padded to the longest episode."""

    observations: Float[ndarray, "N T S"]
    actions: Float[ndarray, "N T A"]
    rewards: Float[ndarray, "N T"]  # float64: zero after an episode's end
    lengths: Int[ndarray, "N"]
    terminated: Bool[ndarray, "N"]
    final_observations: Float[ndarray, "N S"]

    @property
    def returns(self) -> Float[ndarray, "N"]:
        return self.rewards.sum(axis=1)

    def to_dataset(self, episode_ids: Sequence[int]) -> TransitionDataset:
        """The episodes as transitions; one that was cut at its time limit is truncated, not terminated."""
        steps = np.arange(self.rewards.shape[1]) < self.lengths[:, None]  # [N, T]
        ends = np.cumsum(self.lengths)
        flags = {"terminated": self.terminated, "truncated": ~self.terminated}
        columns = {name: np.zeros(ends[-1], dtype=bool) for name in flags}
        for name, flag in flags.items():
            columns[name][ends - 1] = flag
        return TransitionDataset(
            observations=self.observations[steps],
            actions=self.actions[steps],
            rewards=self.rewards[steps].astype(np.float32),
            starts=ends - self.lengths,
            episode_ids=np.asarray(episode_ids),
            final_observations=self.final_observations,
            **columns,
        )


def rollout(
    policy: Policy, env_id: str, *, seeds: Sequence[int], target_returns: Sequence[float], max_timesteps: int
) -> Rollouts:
    """Plays one episode for each seed and target return, all stepping together until the last has ended.

    Raises:
        UserError: the policy's actions don't fit the environment.
    """
    envs = [make_env(env_id) for _ in seeds]
    action_shape = envs[0].action_space.shape
    assert action_shape is not None
    first = np.stack([env.reset(seed=seed)[0] for env, seed in zip(envs, seeds, strict=True)]).astype(np.float32)
    num, observation_dim = first.shape
    # Grown by doubling, so that a limit far beyond the real lengths costs nothing.
    capacity = min(max_timesteps, 256)
    observations = np.zeros((num, capacity, observation_dim), np.float32)
    actions = np.zeros((num, capacity, *action_shape), np.float32)
    rewards = np.zeros((num, capacity))
    lengths, terminated = np.zeros(num, np.int64), np.zeros(num, dtype=bool)
    newest = first.copy()
    live = np.arange(num)
    policy.start(first, np.asarray(target_returns, dtype=np.float64))
    for step in range(max_timesteps):
        if step == capacity:
            capacity *= 2
            observations, actions, rewards = (
                np.concatenate([column, np.zeros_like(column)], axis=1) for column in (observations, actions, rewards)
            )
        chosen = policy.act()
        if chosen.shape != (len(live), *action_shape):
            raise UserError(f"the policy gave actions of shape {chosen.shape[1:]} where {env_id} takes {action_shape}")
        observations[live, step], actions[live, step] = newest[live], chosen
        done = np.zeros(len(live), dtype=bool)
        for i, episode in enumerate(live):
            observation, reward, ended, cut, _ = envs[episode].step(chosen[i])
            newest[episode], rewards[episode, step] = observation, float(reward)
            terminated[episode], done[i] = ended, ended or cut
        lengths[live] += 1
        if done.all() or step + 1 == max_timesteps:
            break
        policy.observe(chosen, rewards[live, step], newest[live])
        if done.any():
            policy.keep(np.flatnonzero(~done))
            live = live[~done]
    for env in envs:
        env.close()
    longest = lengths.max()
    return Rollouts(
        observations=observations[:, :longest],
        actions=actions[:, :longest],
        rewards=rewards[:, :longest],
        lengths=lengths,
        terminated=terminated,
        final_observations=newest,
    )

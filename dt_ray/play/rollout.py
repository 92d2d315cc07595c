"""Episodes played by a policy in many environments at once: what evaluation and collection share.

Legend: N episodes, T the longest, S observation, A action dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray

from dt_ray.data.transitions import TransitionDataset
from dt_ray.environments.batched import is_batched, make_environments
from dt_ray.environments.steps import Environments, Steps
from dt_ray.errors import UserError
from dt_ray.learners.base import Policy

OnStep = Callable[[Environments, Steps], object]


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
    policy: Policy,
    env_id: str,
    *,
    seeds: Sequence[int],
    target_returns: Sequence[float],
    max_timesteps: int,
    batched: bool = True,
    env_kwargs: Mapping[str, Any] | None = None,
    max_envs: int | None = None,
    on_step: OnStep | None = None,
    **options: Any,
) -> Rollouts:
    """Plays one episode for each seed and target return, all stepping together until the last has ended.

    `batched` takes an exact batched copy of the environment where there is one. Elsewhere at most `max_envs`
    environments are open: further episodes are played in the same ones afterwards. `on_step` is called after each step
    with the environments and what the step gave; `options` go to `gymnasium.make`.

    Raises:
        UserError: the policy's actions don't fit the environment.
        BrokenEnvironmentError: the environment crashed, or answered what no policy can act on.
    """
    num = len(seeds)
    size = num if max_envs is None or (batched and is_batched(env_id, env_kwargs)) else min(num, max_envs)
    envs = make_environments(env_id, size, batched=batched, env_kwargs=env_kwargs, **options)
    try:
        parts = []
        for begin in range(0, num, size):
            part = slice(begin, begin + size)
            seeded, asked = seeds[part], target_returns[part]
            parts.append(
                play_in(envs, policy, seeded, asked, max_timesteps=max_timesteps, name=env_id, on_step=on_step)
            )
    finally:
        envs.close()
    return join_rollouts(parts)


def play_in(
    envs: Environments,
    policy: Policy,
    seeds: Sequence[int],
    target_returns: Sequence[float],
    *,
    max_timesteps: int,
    name: str = "the environments",
    on_step: OnStep | None = None,
) -> Rollouts:
    """`rollout` in environments that are there; `name` is what they are called where the policy doesn't fit them."""
    newest = envs.reset(seeds)
    num, observation_dim = newest.shape
    # Grown by doubling, so that a limit far beyond the real lengths costs nothing.
    capacity = min(max_timesteps, 256)
    observations = np.zeros((num, capacity, observation_dim), np.float32)
    actions = np.zeros((num, capacity, *envs.action_shape), np.float32)
    rewards = np.zeros((num, capacity))
    lengths, terminated = np.zeros(num, np.int64), np.zeros(num, dtype=bool)
    live = np.arange(num)
    policy.start(newest.copy(), np.asarray(target_returns, dtype=np.float64))
    for step in range(max_timesteps):
        if step == capacity:
            capacity *= 2
            observations, actions, rewards = (
                np.concatenate([column, np.zeros_like(column)], axis=1) for column in (observations, actions, rewards)
            )
        chosen = policy.act()
        if chosen.shape != (len(live), *envs.action_shape):
            raise UserError(
                f"the policy gave actions of shape {chosen.shape[1:]} where {name} takes {envs.action_shape}"
            )
        if not np.isfinite(chosen).all():
            at = int(np.flatnonzero(~np.isfinite(chosen).all(axis=1))[0])
            raise UserError(
                f"the policy gave the action {chosen[at].tolist()} in {name} (seed {seeds[live[at]]}, step {step + 1})"
            )
        observations[live, step], actions[live, step] = newest[live], chosen
        outcome = envs.step(live, chosen)
        newest[live], rewards[live, step] = outcome.observations, outcome.rewards
        terminated[live] = outcome.terminated
        done = outcome.terminated | outcome.truncated
        lengths[live] += 1
        if on_step is not None:
            on_step(envs, outcome)
        if done.all() or step + 1 == max_timesteps:
            break
        policy.observe(chosen, outcome.rewards, outcome.observations)
        if done.any():
            policy.keep(np.flatnonzero(~done))
            live = live[~done]
    longest = lengths.max()
    return Rollouts(
        observations=observations[:, :longest],
        actions=actions[:, :longest],
        rewards=rewards[:, :longest],
        lengths=lengths,
        terminated=terminated,
        final_observations=newest,
    )


def join_rollouts(parts: Sequence[Rollouts]) -> Rollouts:
    """All episodes of these, padded to the longest."""
    if len(parts) == 1:
        return parts[0]
    longest = max(part.rewards.shape[1] for part in parts)

    def padded(values: ndarray) -> ndarray:
        return np.pad(values, [(0, 0), (0, longest - values.shape[1]), *[(0, 0)] * (values.ndim - 2)])

    columns = {name: [getattr(part, name) for part in parts] for name in vars(parts[0])}
    for name in ("observations", "actions", "rewards"):
        columns[name] = [padded(values) for values in columns[name]]
    return Rollouts(**{name: np.concatenate(values) for name, values in columns.items()})

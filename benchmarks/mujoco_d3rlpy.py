"""d3rlpy's learners on the logs of `mujoco_logs.py`, each as its own reproduction script has it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import d3rlpy
import gymnasium as gym
import numpy as np
import structlog
from numpy import ndarray
from peers import d3rlpy_algorithm

from dt_ray.data import TransitionDataset

structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))  # the tables are on stdout


def play_transformer(
    parts: Sequence[TransitionDataset], env_id: str, *, seed: int, num_updates: int, episodes: Sequence[int]
) -> dict[str, Any]:
    """Its Decision Transformer: three layers of 128, returns divided by 1,000."""
    d3rlpy.seed(seed)
    scalers = d3rlpy.preprocessing
    algorithm = d3rlpy_algorithm(
        parts[0].observations.shape[1],
        parts[0].actions.shape[1],
        observation_scaler=scalers.StandardObservationScaler(),
        reward_scaler=scalers.MultiplyRewardScaler(0.001),
    )
    train_s, target = fit(algorithm, parts, num_updates), max(float(part.episode_returns.max()) for part in parts)
    player = algorithm.as_stateful_wrapper(target_return=target)
    return {"train_s": train_s, **play(env_id, episodes, target, player.predict, player.reset)}


def play_iql(
    parts: Sequence[TransitionDataset], env_id: str, *, seed: int, num_updates: int, episodes: Sequence[int]
) -> dict[str, Any]:
    """Its implicit Q-learning, rewards scaled by the range of the returns."""
    d3rlpy.seed(seed)
    returns = np.concatenate([part.episode_returns for part in parts])
    algorithm = d3rlpy.algos.IQLConfig(
        actor_learning_rate=3e-4,
        critic_learning_rate=3e-4,
        batch_size=256,
        weight_temp=3.0,
        max_weight=100.0,
        expectile=0.7,
        reward_scaler=d3rlpy.preprocessing.MultiplyRewardScaler(1000 / float(np.ptp(returns))),
    ).create(device="cpu:0")
    train_s, target = fit(algorithm, parts, num_updates), float(returns.max())
    return {"train_s": train_s, **play(env_id, episodes, target, lambda seen, _: algorithm.predict(seen[None])[0])}


def fit(algorithm: Any, parts: Sequence[TransitionDataset], num_updates: int) -> float:
    """The seconds that the updates take."""
    ends = [np.isin(np.arange(part.num_transitions), part.ends - 1) for part in parts]
    data = d3rlpy.dataset.MDPDataset(
        observations=np.concatenate([part.observations for part in parts]),
        actions=np.concatenate([part.actions for part in parts]),
        rewards=np.concatenate([part.rewards for part in parts]),
        terminals=np.concatenate([part.terminated for part in parts]).astype(np.float32),
        timeouts=np.concatenate([end & ~part.terminated for end, part in zip(ends, parts, strict=True)]).astype(float),
    )
    quiet = d3rlpy.logging.NoopAdapterFactory()
    began = time.perf_counter()
    algorithm.fit(data, num_updates, n_steps_per_epoch=num_updates, logger_adapter=quiet, show_progress=False)
    return time.perf_counter() - began


def play(
    env_id: str,
    episodes: Sequence[int],
    target: float,
    act: Callable[[ndarray, float], ndarray],
    begin: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """The returns of episodes with these seeds, one after the other, as d3rlpy plays them."""
    env, returns, num_steps, began = gym.make(env_id), [], 0, time.perf_counter()
    for seed in episodes:
        begin()
        observation, reward, rewards, is_over = env.reset(seed=seed)[0], 0.0, [], False
        while not is_over:
            action = act(observation.astype(np.float32), reward)
            observation, reward, terminated, truncated, _ = env.step(action)
            reward, is_over = float(reward), terminated or truncated
            rewards.append(reward)
        returns.append(sum(rewards))
        num_steps += len(rewards)
    play_s = time.perf_counter() - began
    return {"returns": {f"{target:g}": returns}, "play_s": play_s, "steps_per_s": num_steps / play_s}

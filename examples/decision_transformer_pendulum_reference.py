"""A Decision Transformer on Pendulum-v1, step by step: what `python -m dt_ray.train` does, in one process and one page.

    python examples/decision_transformer_pendulum_reference.py [updates] [episodes]

Data, model, loss and policy are the package's; the loop, the batches and the evaluation are written out.
"""

import sys

import gymnasium as gym
import numpy as np
import torch

from dt_ray.config.schema import ModelConfig
from dt_ray.data import Normalizer, slice_windows
from dt_ray.data.logs.episodes import from_table
from dt_ray.data.spaces import read_spaces
from dt_ray.data.transitions import join_episodes
from dt_ray.learners.policies import DecisionTransformerPolicy
from dt_ray.losses import decision_transformer_loss
from dt_ray.models import DecisionTransformerModel, WindowBatch
from dt_ray.play.collection import CollectionPlan, collect_here

ENV_ID, CONTEXT, BATCH = "Pendulum-v1", 10, 128


def main(num_updates: int = 5000, num_episodes: int = 2000, *, seed: int = 0) -> dict[float, float]:
    """The mean return for each return that is asked for."""
    spec, generator = read_spaces(ENV_ID), np.random.default_rng(seed)
    torch.manual_seed(seed)

    # Episodes of every quality, and the units that the model works in.
    plan = CollectionPlan(env_id=ENV_ID, behavior="mixed", num_episodes=num_episodes, seed=100_000, max_timesteps=200)
    data = join_episodes([from_table(table, source="collected") for table in collect_here(plan)])
    normalizer = Normalizer.fit(data, spec)

    # Supervised learning of the actions, given what was still to come (Chen et al. 2021, algorithm 1).
    model = DecisionTransformerModel(
        ModelConfig(context_length=CONTEXT, num_layers=2, width=64, max_timesteps=200), spec
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=num_updates, pct_start=0.04)
    for _ in range(num_updates):
        windows = slice_windows(data, generator.integers(data.num_transitions, size=BATCH), length=CONTEXT)
        batch = WindowBatch.from_windows(windows, normalizer)
        batch.returns_to_go.add_(torch.randn(BATCH, 1) * 35 * normalizer.return_scale)  # see data.return_noise
        loss, _ = decision_transformer_loss(model.predict_actions(batch), batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()

    # Twenty episodes for each wish, all at once.
    policy = DecisionTransformerPolicy(model, normalizer)
    return {target: play(policy, target, num_episodes=20) for target in (-130.0, -300.0, -600.0, -900.0)}


def play(policy: DecisionTransformerPolicy, target_return: float, *, num_episodes: int) -> float:
    """The mean return of episodes with the seeds from 0 on, none of which ends before the others."""
    envs = [gym.make(ENV_ID) for _ in range(num_episodes)]
    policy.start(
        np.stack([env.reset(seed=seed)[0] for seed, env in enumerate(envs)]), np.full(num_episodes, target_return)
    )
    returns, done = np.zeros(num_episodes), False
    while not done:
        actions = policy.act()
        observations, rewards, terminated, truncated, _ = zip(
            *(env.step(action) for env, action in zip(envs, actions, strict=True)), strict=True
        )
        policy.observe(actions, np.array(rewards), np.stack(observations))
        returns += rewards
        done = any(terminated) or any(truncated)
    return float(returns.mean())


if __name__ == "__main__":
    for target, reached in main(*map(int, sys.argv[1:])).items():
        print(f"asked for {target:g}, reached {reached:.1f}")

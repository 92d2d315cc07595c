"""dt_ray on the same work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import numpy as np
from work import (
    ACTION,
    BATCH,
    CONTEXT,
    DROPOUT,
    ENV_ACTION,
    ENV_ID,
    ENV_STATE,
    ENV_STEPS,
    EPISODE_STEPS,
    GRADIENT_CLIP,
    LEARNING_RATE,
    NUM_EPISODES,
    NUM_HEADS,
    NUM_LAYERS,
    STATE,
    WEIGHT_DECAY,
    WIDTH,
    Episodes,
    Measure,
    repeated,
)

from dt_ray.config.schema import DataConfig, EvaluationConfig, ModelConfig, OptimConfig, RunConfig
from dt_ray.data import TransitionDataset
from dt_ray.data.spaces import SpaceSpec, read_spaces
from dt_ray.learners import LEARNERS, Learner
from dt_ray.play.evaluation import evaluate
from dt_ray.training.resident import ResidentData, ResidentSource

SPEC = SpaceSpec(observation_dim=STATE, action_dim=ACTION, action_low=(-1.0,) * ACTION, action_high=(1.0,) * ACTION)


def configure(
    layout: Literal["step", "triplet"] = "step", attention: Literal["window", "band"] = "window"
) -> RunConfig:
    return RunConfig(
        model=ModelConfig(
            context_length=CONTEXT,
            token_layout=layout,
            attention=attention,
            num_layers=NUM_LAYERS,
            num_heads=NUM_HEADS,
            width=WIDTH,
            activation="relu",
            dropout=DROPOUT,
        ),
        data=DataConfig(validation_fraction=0.0, window_length=CONTEXT if attention == "band" else None),
        optim=OptimConfig(
            batch_size=BATCH, learning_rate=LEARNING_RATE, weight_decay=WEIGHT_DECAY, gradient_clip=GRADIENT_CLIP
        ),
    )


def make_dataset(num_episodes: int = NUM_EPISODES) -> TransitionDataset:
    data = Episodes.make(num_episodes)
    return TransitionDataset(
        observations=data.observations.reshape(-1, STATE),
        actions=data.actions.reshape(-1, ACTION),
        rewards=data.rewards.reshape(-1),
        starts=np.arange(num_episodes) * EPISODE_STEPS,
    )


def make_source(config: RunConfig) -> ResidentSource:
    return ResidentSource(ResidentData.build(make_dataset(), SPEC, config), config)


def make_learner(config: RunConfig, source: ResidentSource) -> Learner:
    return LEARNERS["decision_transformer"](config, source.spec, source.normalizer)


def update(layout: Literal["step", "triplet"]) -> Callable[[], Measure]:
    def build() -> Measure:
        config = configure(layout)
        source = make_source(config)
        learner, batch = make_learner(config, source), source.batch(0)
        return repeated(8, lambda: learner.update(batch))

    return build


def batches() -> Measure:
    source, steps = make_source(configure()), iter(range(10**9))
    return repeated(3000, lambda: source.batch(next(steps)))


def gather() -> Measure:
    """The limit of a batch from memory: NumPy copies the same windows from rows that are known beforehand."""
    rows = make_source(configure()).train.blocks.numpy()
    draws = iter(np.random.default_rng(0).integers(len(rows), size=(10**5, BATCH)))
    out = np.empty((BATCH, rows.shape[1]), np.float32)

    def take() -> None:
        out[:] = rows[next(draws)]

    return repeated(3000, take)


def evaluation(
    attention: Literal["window", "band"], num_targets: int, num_episodes: int, *, batched_env: bool = True
) -> Callable[[], Measure]:
    def build() -> Measure:
        settings = EvaluationConfig(
            target_returns=tuple(np.linspace(-1000.0, -200.0, num_targets).tolist()),
            num_episodes=num_episodes,
            batched_env=batched_env,
        )
        config = replace(configure(attention=attention), evaluation=settings)
        generator = np.random.default_rng(0)
        data = TransitionDataset(
            observations=generator.normal(size=(ENV_STEPS, ENV_STATE)).astype(np.float32),
            actions=generator.uniform(-2, 2, size=(ENV_STEPS, ENV_ACTION)).astype(np.float32),
            rewards=-generator.random(ENV_STEPS).astype(np.float32),
            starts=np.array([0]),
        )
        source = ResidentSource(ResidentData.build(data, read_spaces(ENV_ID), config), config)
        policy = make_learner(config, source).policy()
        return repeated(
            1, lambda: evaluate(policy, ENV_ID, settings, step=0), each=num_targets * num_episodes * ENV_STEPS
        )

    return build


OURS = {
    "update, step": update("step"),
    "update, triplet": update("triplet"),
    "batches": batches,
    "gather": gather,
    "evaluation, 100 episodes": evaluation("window", 1, 100),
    "evaluation, 100 episodes of Gymnasium's": evaluation("window", 1, 100, batched_env=False),
    "evaluation, 100 episodes, band and cache": evaluation("band", 1, 100),
    "evaluation, 1 target x 96": evaluation("window", 1, 96),
    "evaluation, 8 targets x 12": evaluation("window", 8, 12),
}

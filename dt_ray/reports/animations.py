"""Animations of a policy at work."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dt_ray.config.schema import EvaluationConfig
from dt_ray.config.targets import show_target
from dt_ray.environments.checked import GymnasiumEnvironments
from dt_ray.environments.steps import Environments, Steps
from dt_ray.errors import UserError
from dt_ray.learners import Policy
from dt_ray.play.rollout import rollout


def record_episodes(
    policy: Policy, env_id: str, config: EvaluationConfig, file: str, *, env_kwargs: Mapping[str, Any] | None = None
) -> None:
    """Writes an animated GIF of the first evaluation episode, one part for each target return.

    Raises:
        UserError: the file is no GIF, the environment can't be drawn here, or it fails.
    """
    if Path(file).suffix.lower() != ".gif":
        raise UserError(f"--video writes GIF files, got {file!r}")
    frames = [
        frame for target in config.target_returns for frame in _draw_episode(policy, env_id, config, target, env_kwargs)
    ]
    frames[0].save(file, save_all=True, append_images=frames[1:], duration=33, loop=0)


def _draw_episode(
    policy: Policy, env_id: str, config: EvaluationConfig, target: float, env_kwargs: Mapping[str, Any] | None
) -> list[Any]:
    from PIL import Image, ImageDraw

    frames, reached = [], 0.0

    def draw(envs: Environments, step: Steps) -> None:
        nonlocal reached
        assert isinstance(envs, GymnasiumEnvironments)
        reached += float(step.rewards[0])
        try:
            frame = Image.fromarray(np.asarray(envs.envs[0].render())).resize((240, 240))
        except Exception as error:
            raise UserError(f"{env_id} can't be drawn here: {error}") from None
        ImageDraw.Draw(frame).text((6, 6), f"asked {show_target(target)}, so far {reached:.0f}", fill=(0, 0, 0))
        frames.append(frame)

    rollout(
        policy,
        env_id,
        seeds=[config.seed],
        target_returns=[target],
        max_timesteps=config.max_timesteps,
        batched=False,
        env_kwargs=env_kwargs,
        on_step=draw,
        render_mode="rgb_array",
    )
    return frames

"""Pictures: obedience, the returns in a dataset, and the policy at work."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from dt_ray.config.schema import EvaluationConfig
from dt_ray.environments.checked import GymnasiumEnvironments
from dt_ray.errors import UserError
from dt_ray.learners import Policy
from dt_ray.runs.evaluation_report import EvaluationReport

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#7f7f7f"  # Okabe and Ito (2008): told apart by colour-blind readers


def draw_obedience(report: EvaluationReport, file: str) -> None:
    """Returns reached against returns asked for: every episode, the mean with its interval, and the diagonal."""
    figure, axes = _figure(file)
    targets = sorted(report.targets, key=lambda target: target.target_return)
    asked = np.array([target.target_return for target in targets])
    means = np.array([target.return_mean for target in targets])
    intervals = np.array([target.return_ci95 for target in targets])
    spread = 0.012 * (np.ptp(asked) or 1.0)
    for target in targets:
        returns = np.array(target.episode_returns)
        around = target.target_return + np.random.default_rng(0).uniform(-spread, spread, len(returns))
        axes.scatter(around, returns, s=8, color=GREY, alpha=0.35, linewidths=0)
    lowest = min(asked.min(), min(min(target.episode_returns) for target in targets))
    highest = max(asked.max(), max(max(target.episode_returns) for target in targets))
    axes.plot([lowest, highest], [lowest, highest], color=ORANGE, linestyle="--", label="return asked for")
    axes.errorbar(
        asked,
        means,
        yerr=np.abs(intervals.T - means),
        color=BLUE,
        marker="o",
        capsize=4,
        label="mean reached, 95% interval",
    )
    axes.scatter([], [], s=8, color=GREY, label="one episode")
    axes.set_xlabel("target return (sum of rewards)")
    axes.set_ylabel("return reached (sum of rewards)")
    axes.set_title(f"{report.env_id}: {report.num_episodes} episodes a target, after {report.step} updates")
    axes.legend(frameon=False)
    figure.savefig(file, dpi=150)


def draw_returns(returns: Float[ndarray, "E"], title: str, file: str) -> None:
    """The histogram of a dataset's episode returns, with its quartiles."""
    figure, axes = _figure(file)
    axes.hist(returns, bins=min(40, max(5, len(returns) // 5)), color=BLUE, alpha=0.85)
    for share in (0.25, 0.5, 0.75):
        value = np.quantile(returns, share)
        axes.axvline(value, color=ORANGE, linestyle="--")
        axes.annotate(f"{share:.0%}: {value:.0f}", (value, 0.97), xycoords=("data", "axes fraction"), rotation=90,
                      va="top", ha="right", fontsize=8)  # fmt: skip
    axes.set_xlabel("episode return (sum of rewards)")
    axes.set_ylabel("episodes")
    axes.set_title(title)
    figure.savefig(file, dpi=150)


def record_episodes(
    policy: Policy, env_id: str, config: EvaluationConfig, file: str, *, env_kwargs: Mapping[str, Any] | None = None
) -> None:
    """Writes an animated GIF of the first evaluation episode, one part for each target return.

    Raises:
        UserError: the file is no GIF, the environment can't be drawn here, or it fails.
    """
    if Path(file).suffix.lower() != ".gif":
        raise UserError(f"--video writes GIF files, got {file!r}")
    frames = []
    for target in config.target_returns:
        envs = GymnasiumEnvironments(env_id, 1, env_kwargs, render_mode="rgb_array")
        try:
            frames += _draw_episode(policy, envs, config, target)
        finally:
            envs.close()
    frames[0].save(file, save_all=True, append_images=frames[1:], duration=33, loop=0)


def _draw_episode(policy: Policy, envs: GymnasiumEnvironments, config: EvaluationConfig, target: float) -> list[Any]:
    from PIL import Image, ImageDraw

    frames, reached = [], 0.0
    policy.start(envs.reset([config.seed]), np.array([target]))
    for _ in range(config.max_timesteps):
        action = policy.act()
        step = envs.step(np.zeros(1, np.int64), action)
        reached += float(step.rewards[0])
        policy.observe(action, step.rewards, step.observations)
        try:
            frame = Image.fromarray(np.asarray(envs.envs[0].render())).resize((240, 240))
        except Exception as error:
            raise UserError(f"{envs.env_id} can't be drawn here: {error}") from None
        ImageDraw.Draw(frame).text((6, 6), f"asked {target:g}, so far {reached:.0f}", fill=(0, 0, 0))
        frames.append(frame)
        if step.terminated[0] or step.truncated[0]:
            break
    return frames


def _figure(file: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    known = (".png", ".svg", ".pdf")
    if Path(file).suffix.lower() not in known:
        raise UserError(f"a picture is a {', '.join(known)} file, got {file!r}")
    Path(file).absolute().parent.mkdir(parents=True, exist_ok=True)
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.add_subplot()
    axes.grid(alpha=0.25)
    return figure, axes

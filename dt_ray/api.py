"""The Python interface: what the commands do, as objects.

Legend: B windows, N live episodes, A action dimension.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray
from typing_extensions import Self

from dt_ray.config.loading import change_evaluation, decode_config, read_settings, to_plain, with_values
from dt_ray.config.schema import DEFAULT_CONFIG, RunConfig
from dt_ray.config.targets import AUTO, read_target
from dt_ray.data.blocks import EpisodeBlocks
from dt_ray.data.logs.datasets import read_parts
from dt_ray.data.spaces import needed_environment
from dt_ray.data.windows import Windows
from dt_ray.errors import ConfigError, RunError
from dt_ray.jobs.deriving import ResolvedSettings, resolve_settings
from dt_ray.jobs.offline import estimate_run, train_and_estimate
from dt_ray.jobs.training import check_run, name_run, read_held_out, resumed_config
from dt_ray.learners import Learner, Policy, make_learner
from dt_ray.models.batch import WindowBatch
from dt_ray.play.evaluation import evaluate
from dt_ray.play.held_out import evaluate_held_out
from dt_ray.runs.checkpoint import MANIFEST, load_learner, save_checkpoint
from dt_ray.runs.folder import checkpoint_at
from dt_ray.runs.recommendations import check_targets, recommended_target
from dt_ray.runs.storage import Folder
from dt_ray.training.layout import plan_layout
from dt_ray.training.recorder import TrainResult

log = logging.getLogger("dt_ray")


def train_decision_transformer(
    config: RunConfig | str | None = None,
    *,
    overrides: Sequence[str] = (),
    overwrite: bool = False,
    **settings: Any,
) -> TrainResult:
    """Trains a run: what `python -m dt_ray.train` does. By itself it collects random Pendulum episodes for that.

    Settings are those of `DecisionTransformer`; a log among them, `data={"path": LOG}`, starts from the neutral ones.

    Raises:
        UserError: as the command, whose exit code would be 2.
    """
    chosen = _resolve(config, overrides, settings, default="decision_transformer/pendulum_random")
    run = name_run(chosen.config, config if isinstance(config, str) else chosen.config.algorithm)
    return train_and_estimate(run, overwrite=overwrite, read=chosen.read)[0]


def _resolve(
    config: RunConfig | str | None, overrides: Sequence[str], settings: Mapping[str, Any], *, default: str
) -> ResolvedSettings:
    changes = {
        (f"{key}.{part}" if part else key): one
        for key, value in settings.items()
        for part, one in (value.items() if isinstance(value, Mapping) else [("", value)])
    }
    if isinstance(config, RunConfig):
        return ResolvedSettings(config=decode_config(with_values(to_plain(config), changes), overrides))
    resolved = resolve_settings(read_settings(config, overrides, changes=changes, default=default))
    for each in resolved.derived:
        log.info("%s=%s: %s", each.key, each.shown, each.why)
    return resolved


class Algorithm:
    """A learner with its data, its run and its policy.

    Settings are a `RunConfig`, a configuration's name or file; `section.key=value` overrides; and fields by their
    names, those of a section as a mapping: `DecisionTransformer(total_timesteps=500, model={"width": 32})`.
    """

    name: ClassVar[str]
    default_config: ClassVar[str]

    def __init__(
        self, config: RunConfig | str | None = None, *, overrides: Sequence[str] = (), **settings: Any
    ) -> None:
        if config is None:
            settings = {"algorithm": self.name, **settings}
        self.config = _resolve(config, overrides, settings, default=self.default_config).config
        if self.config.algorithm != self.name:
            raise ConfigError(f"{type(self).__name__} trains algorithm={self.name}, got {self.config.algorithm}")
        self._learner: Learner | None = None
        self._checkpoint: Folder | None = None  # that the learner was loaded from, and not changed since

    @classmethod
    def load(cls, run_or_checkpoint: str | Path) -> Self:
        """The model of a checkpoint, or of a run's newest complete one, ready to act, evaluate and go on learning.

        Raises:
            RunError: there is none, or it is damaged.
            ConfigError: it is of another algorithm.
        """
        checkpoint = checkpoint_at(Folder.at(run_or_checkpoint))
        learner, config = load_learner(checkpoint)
        model = cls(config)
        model._learner, model._checkpoint = learner, checkpoint
        return model

    @classmethod
    def resume(cls, run: str | Path, *, overrides: Sequence[str] = ()) -> Self:
        """Goes on with a run until its `total_timesteps` updates are made, and returns what it became."""
        config = resumed_config(str(run), overrides)
        result, _ = train_and_estimate(config, resume=True)
        return cls.load(result.run)

    @property
    def learner(self) -> Learner:
        """The learner; a new one is fitted to the units of the configured dataset, which is read for that."""
        if self._learner is None:
            spec = check_run(self.config)
            layout, _ = plan_layout(EpisodeBlocks(read_parts(self.config.data, spec)), spec, self.config)
            self._learner, self.config = make_learner(self.config, layout.spec, layout.normalizer, layout.values)
        return self._learner

    def train(self, *, total_timesteps: int | None = None) -> TrainResult:
        """Trains a new run of `total_timesteps` gradient updates and takes over what it learned."""
        config = self.config if total_timesteps is None else replace(self.config, total_timesteps=total_timesteps)
        result, _ = train_and_estimate(name_run(config, config.algorithm))
        self._checkpoint = checkpoint_at(Folder.at(result.run))
        self._learner, self.config = load_learner(self._checkpoint)
        return result

    def update(self, windows: Windows) -> dict[str, float]:
        """One gradient step on windows in the environment's units; returns the named metrics."""
        self._checkpoint = None
        metrics = self.learner.update(WindowBatch.from_windows(windows, self.learner.normalizer))
        return {name: float(value) for name, value in metrics.items()}

    def evaluate(
        self, *, target_returns: Sequence[float | str] | None = None, num_episodes: int | None = None
    ) -> dict[str, Any]:
        """Plays evaluation episodes in this process; the report has the form of `evaluations/*.json`.

        Without an environment it replays the held-out episodes of the log.

        Raises:
            ConfigError: target returns or a number of episodes, and no environment.
        """
        if self.config.env_id is None and target_returns is None and num_episodes is None:
            held_out = read_held_out(self.config)
            return evaluate_held_out(self.policy(), held_out, self.config.evaluation, step=self.learner.step).to_dict()
        env_id = needed_environment(self.config.env_id, "an evaluation at target returns")
        settings = change_evaluation(
            self.config.evaluation,
            self.config.model,
            target_returns=None if target_returns is None else tuple(target_returns),
            num_episodes=num_episodes,
        )
        report = evaluate(self.policy(), env_id, settings, step=self.learner.step, env_kwargs=self.config.env_kwargs)
        return report.to_dict()

    eval = evaluate

    def evaluate_offline(self, *, log: str | Path | None = None) -> dict[str, Any]:
        """What the policy of a loaded or trained run will reach, estimated from its log or another one alone.

        The report has the form of `evaluations/offline-*.json`. A world model of the log is trained when needed.

        Raises:
            RunError: the model was changed since it was loaded, or is not of a run.
        """
        place = None if log is None else str(log)
        return estimate_run(self._own_checkpoint("an estimate"), log_path=place).to_dict()

    def _own_checkpoint(self, wanted: str) -> Folder:
        if self._checkpoint is None:
            raise RunError(f"{wanted} is of a run's checkpoint: train(), or load(RUN), comes before it")
        return self._checkpoint

    def predict(
        self,
        observations: Float[ndarray, "*any S"] | Windows,
        *,
        target_return: float | str | Float[ndarray, "N"] = 0.0,
        actions: Float[ndarray, "N T-1 A"] | None = None,
        rewards: Float[ndarray, "N T-1"] | None = None,
        clip: bool = False,
    ) -> Float[ndarray, "*any A"]:
        """The next action of one episode or of N live ones, in the environment's units.

        Observations are those of one first step, [S]; of N first steps, [N, S]; or of T steps of N episodes, [N, T, S],
        with the T - 1 actions and rewards between them. `target_return` is what the whole episode is asked for, "max",
        or "auto": what `evaluate_offline` recommends. With `clip` a target return that the log does not support by
        those estimates is replaced by the nearest one that it does, and a warning says so. A policy (`policy()`) does
        the same step by step. Of `Windows`, the actions at their last real steps.

        Raises:
            ConfigError: the shapes don't fit together.
            RunError: "auto" or `clip`, and nothing was estimated yet.
        """
        if isinstance(observations, Windows):
            return self._predict_windows(observations)
        seen = np.asarray(observations, np.float32)
        one = seen.ndim == 1
        seen = seen[None, None] if one else seen[:, None] if seen.ndim == 2 else seen
        spec, past = self.learner.spec, seen.shape[1] - 1 if seen.ndim == 3 else 0
        taken = np.zeros((len(seen), 0, spec.action_dim)) if actions is None else np.asarray(actions)
        earned = np.zeros((len(seen), 0)) if rewards is None else np.asarray(rewards)
        expected = (len(seen), past, spec.action_dim)
        if seen.shape[2:] != (spec.observation_dim,) or taken.shape != expected or earned.shape != expected[:2]:
            raise ConfigError(
                f"observations are [{spec.observation_dim}], [N, {spec.observation_dim}] or [N, T, "
                f"{spec.observation_dim}] with actions [N, T-1, {spec.action_dim}] and rewards [N, T-1], got "
                f"{np.shape(observations)}, {taken.shape} and {earned.shape}"
            )
        policy = self.policy()
        if isinstance(target_return, str):
            is_auto = target_return == AUTO
            asked = recommended_target(self._own_checkpoint("auto")) if is_auto else read_target(target_return)
        else:
            asked = target_return
        if clip:
            wanted = np.asarray(asked, np.float64)
            checked = check_targets(wanted.ravel().tolist(), self._own_checkpoint("clip"), clip=True)
            asked = np.reshape([each.used for each in checked], wanted.shape)
        policy.start(seen[:, 0], np.broadcast_to(np.asarray(asked, np.float64), len(seen)))
        for step in range(past):
            policy.observe(taken[:, step].astype(np.float32), earned[:, step], seen[:, step + 1])
        predicted = policy.act()
        return predicted[0] if one else predicted

    def _predict_windows(self, windows: Windows) -> Float[ndarray, "B A"]:
        normalizer = self.learner.normalizer
        self.learner.model.eval()
        with torch.inference_mode():
            predicted = self.learner.model.predict_last_action(WindowBatch.from_windows(windows, normalizer))
        return normalizer.denormalize_actions(np.asarray(predicted))

    def policy(self) -> Policy:
        """A policy with a copy of the present weights, for live episodes."""
        return self.learner.policy()

    def save(self, folder: str | Path) -> None:
        """Writes a checkpoint: what `load` and `python -m dt_ray.evaluate` read.

        Raises:
            RunError: something else is there, or the disk can't be written.
        """
        place = Folder.at(folder)
        if place.exists() and place.names() and not (place / MANIFEST).exists():
            raise RunError(f"{place} exists and is no checkpoint; choose another folder")
        save_checkpoint(place, self.learner, config=self.config)


class DecisionTransformer(Algorithm):
    """A transformer that acts to reach the return it is asked for (Chen et al. 2021)."""

    name = "decision_transformer"
    default_config = DEFAULT_CONFIG


class BehaviorCloning(Algorithm):
    """The same transformer without the return; with `data.top_fraction`, on the best episodes only."""

    name = "behavior_cloning"
    default_config = "behavior_cloning/pendulum"


class IQL(Algorithm):
    """Implicit Q-learning (Kostrikov et al. 2021): puts good steps of bad episodes together."""

    name = "iql"
    default_config = "iql/pendulum_random"

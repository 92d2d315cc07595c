"""The Python interface: what the commands do, as objects.

Legend: B windows, N live episodes, A action dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray

from dt_ray import launch
from dt_ray.checkpoint import MANIFEST, load_learner, save_checkpoint
from dt_ray.config import DEFAULT_CONFIG, RunConfig
from dt_ray.config_io import change_evaluation, decode_config, load_config, to_plain
from dt_ray.data.reading import read_dataset
from dt_ray.data.windows import Windows
from dt_ray.errors import RunError
from dt_ray.evaluation import evaluate
from dt_ray.learners import LEARNERS, Learner, Policy
from dt_ray.models.batch import WindowBatch
from dt_ray.recording import TrainResult
from dt_ray.runs import find_checkpoint
from dt_ray.sources import split_and_fit
from dt_ray.storage import Folder


def train_decision_transformer(
    config: RunConfig | str = DEFAULT_CONFIG, *, overrides: Sequence[str] = (), overwrite: bool = False
) -> TrainResult:
    """Trains a run from a configuration, its name or its file: what `python -m dt_ray.train` does.

    Raises:
        UserError: as the command, whose exit code would be 2.
    """
    name = config if isinstance(config, str) else config.algorithm
    return launch.start_run(launch.name_run(_read_settings(config, overrides), name), overwrite=overwrite)


def _read_settings(config: RunConfig | str, overrides: Sequence[str]) -> RunConfig:
    return load_config(config, overrides) if isinstance(config, str) else decode_config(to_plain(config), overrides)


class DecisionTransformer:
    """A learner with its data, its run and its policy.

    Settings are a `RunConfig`, a configuration's name or file, and `section.key=value` overrides.
    """

    def __init__(self, config: RunConfig | str = DEFAULT_CONFIG, *, overrides: Sequence[str] = ()) -> None:
        self.config = _read_settings(config, overrides)
        self._learner: Learner | None = None

    @classmethod
    def load(cls, run_or_checkpoint: str | Path) -> DecisionTransformer:
        """The model of a checkpoint, or of a run's newest complete one, ready to act, evaluate and go on learning.

        Raises:
            RunError: there is none, or it is damaged.
        """
        learner, config = load_learner(find_checkpoint(Folder.at(run_or_checkpoint)))
        model = cls(config)
        model._learner = learner
        return model

    @classmethod
    def resume(cls, run: str | Path, *, overrides: Sequence[str] = ()) -> DecisionTransformer:
        """Goes on with a run until its `total_timesteps` updates are made, and returns what it became."""
        config = launch.resumed_config(str(run), overrides)
        result = launch.resume_run(config)
        return cls.load(result.run)

    @property
    def learner(self) -> Learner:
        """The learner; a new one is fitted to the units of the configured dataset, which is read for that."""
        if self._learner is None:
            spec = launch.check_run(self.config)
            *_, normalizer = split_and_fit(read_dataset(self.config.data, spec), spec, self.config)
            self._learner = LEARNERS[self.config.algorithm](self.config, spec, normalizer)
        return self._learner

    def train(self, *, total_timesteps: int | None = None) -> TrainResult:
        """Trains a new run of `total_timesteps` gradient updates and takes over what it learned."""
        config = self.config if total_timesteps is None else replace(self.config, total_timesteps=total_timesteps)
        result = train_decision_transformer(config)
        self._learner, self.config = load_learner(find_checkpoint(Folder.at(result.run)))
        return result

    def update(self, windows: Windows) -> dict[str, float]:
        """One gradient step on windows in the environment's units; returns the named metrics."""
        metrics = self.learner.update(WindowBatch.from_windows(windows, self.learner.normalizer))
        return {name: float(value) for name, value in metrics.items()}

    def evaluate(
        self, *, target_returns: Sequence[float] | None = None, num_episodes: int | None = None
    ) -> dict[str, Any]:
        """Plays evaluation episodes in this process; the report has the form of `evaluations/*.json`."""
        settings = change_evaluation(
            self.config.evaluation,
            self.config.model,
            target_returns=None if target_returns is None else tuple(target_returns),
            num_episodes=num_episodes,
        )
        return evaluate(self.policy(), self.config.env_id, settings, step=self.learner.step)

    eval = evaluate

    def predict(self, windows: Windows) -> Float[ndarray, "B A"]:
        """The action at the last real step of each window, both in the environment's units."""
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

"""Packaged experiments, each with its purpose and the returns that it is expected to reach."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from dt_ray.config.loading import load_config
from dt_ray.config.schema import CheckpointConfig, LoggingConfig, RunConfig, ScalingConfig
from dt_ray.config.targets import show_target


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A configuration by name, and the mean return that its last evaluation should have."""

    config: str
    purpose: str
    target_return: float  # at which it is judged
    expected: tuple[float, float]  # mean return of the first episodes, of several training seeds and a little wider
    measured_on: str = ""  # the data, where it is not what the configuration names
    baselines: tuple[str, ...] = ()  # configurations to run beside it

    def describes(self, config: RunConfig) -> bool:
        """Whether a run is this experiment, whatever its name, folder, training seed and machine."""
        return _essence(config) == _essence(load_config(self.config))

    def judge(self, return_means: Mapping[float, float]) -> str:
        """A sentence that compares an evaluation with what is expected; mean returns are given by target return."""
        (low, high), target = self.expected, show_target(self.target_return)
        if (mean := return_means.get(self.target_return)) is None:
            return f"not evaluated at {target}"
        place = "within" if low <= mean <= high else "below" if mean < low else "above"
        said = f" (measured on {self.measured_on})" if self.measured_on else ""
        return f"{mean:.1f} at {target} is {place} the expected {low:g} .. {high:g}{said}"


EXPERIMENTS = (
    Experiment(
        config="decision_transformer/pendulum",
        purpose="the main job: returns asked for and reached, from episodes of every quality",
        target_return=-130,
        expected=(-150, -138),
        baselines=("behavior_cloning/pendulum", "decision_transformer/pendulum_obedient"),
    ),
    Experiment(
        config="decision_transformer/pendulum_obedient",
        purpose="the wish told to the action head, bad episodes seen as often: it obeys more closely, and knows max",
        target_return=math.inf,
        expected=(-148, -138),
        baselines=("decision_transformer/pendulum",),
    ),
    Experiment(
        config="decision_transformer/pendulum_random",
        purpose="random actions alone: a Decision Transformer is no better than its data",
        target_return=-130,
        expected=(-1260, -1100),
        baselines=("iql/pendulum_random", "decision_transformer/pendulum_stitching"),
    ),
    Experiment(
        config="decision_transformer/pendulum_stitching",
        purpose="random actions alone: with learned values it puts good steps of bad episodes together, and obeys",
        target_return=-130,
        expected=(-190, -160),
        baselines=("iql/pendulum_random",),
    ),
    Experiment(
        config="behavior_cloning/pendulum",
        purpose="the same transformer without the return, on the best tenth of the episodes",
        target_return=-130,
        expected=(-260, -138),
    ),
    Experiment(
        config="iql/pendulum_random",
        purpose="random actions alone: implicit Q-learning puts good steps of bad episodes together",
        target_return=-130,
        expected=(-170, -155),
    ),
)


def find_experiment(config: RunConfig) -> Experiment | None:
    """The packaged experiment that a run is, if it is one."""
    return next((experiment for experiment in EXPERIMENTS if experiment.describes(config)), None)


def _essence(config: RunConfig) -> RunConfig:
    return replace(
        config,
        name=None,
        seed=0,
        storage_path="",
        data=replace(config.data, path="", residency="auto", memory_mb=1),
        evaluation=replace(config.evaluation, every=0, num_actors=None, max_envs=1),
        checkpoint=CheckpointConfig(),
        scaling=ScalingConfig(),
        logging=LoggingConfig(),
    )

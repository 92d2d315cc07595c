"""How far an estimate of returns from the log alone can be trusted: beside the returns that the environment gives.

    python benchmarks/offline.py --data FOLDER [--logs NAME ...] [--folder DIR] [--development]

`FOLDER` has `pendulum_policies/` and `mujoco/`: logs, and public policies whose returns are known. Each log gets
policies of three kinds, most of them at several updates and target returns; the truth is 100 episodes each from seed
1000 on. World models and policies have training seed 0. `--development` is what settings were chosen by: training
seed 7, and seeds from 2000 on. Everything lies in `--folder`, and what is there is not computed again.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dt_ray.config.loading import read_settings
from dt_ray.config.schema import EvaluationConfig, RunConfig
from dt_ray.jobs.deriving import resolve_settings
from dt_ray.jobs.training import start_run
from dt_ray.learners.base import Policy
from dt_ray.play.rollout import rollout
from dt_ray.runs.checkpoint import load_policy
from dt_ray.runs.folder import RunFolder

NUM_EPISODES = 100
REPORT, DEVELOPMENT = (0, 1000), (7, 2000)  # training seed, seed of the first episode


@dataclass(frozen=True, kw_only=True)
class Log:
    env_id: str
    path: str  # in the folder of the data
    settings: tuple[str, ...] = ()  # of all runs on it
    targets: tuple[float, ...]
    public: str = ""  # the prefix of the public policies' files


LOGS = {
    "pendulum-mixed": Log(
        env_id="Pendulum-v1", path="pendulum_policies/mixed.parquet", targets=(-130, -300, -600, -900)
    ),
    "pendulum-medium": Log(
        env_id="Pendulum-v1", path="pendulum_policies/medium.parquet", targets=(-130, -300, -600, -900)
    ),
    "pendulum-random": Log(
        env_id="Pendulum-v1", path="pendulum_policies/random.parquet", targets=(-300, -600, -900, -1300)
    ),
    "pendulum-narrow": Log(
        env_id="Pendulum-v1",
        path="pendulum_policies/mixed.parquet",
        settings=("data.top_fraction=0.166",),  # the 100 best of 602 episodes
        targets=(-130, -300, -600, -900),
    ),
    "hopper-ladder": Log(
        env_id="Hopper-v5", path="mujoco/Hopper/ladder.parquet", targets=(3600, 2400, 1200, 500), public="Hopper"
    ),
    "half-cheetah-ladder": Log(
        env_id="HalfCheetah-v5",
        path="mujoco/HalfCheetah/ladder.parquet",
        targets=(12000, 8000, 4000, 1000),
        public="HalfCheetah",
    ),
    "walker2d-ladder": Log(
        env_id="Walker2d-v5", path="mujoco/Walker2d/ladder.parquet", targets=(4500, 3000, 1500, 500), public="Walker2d"
    ),
}

# Of each kind: the configuration to start from, and settings; all checkpoints of a run are policies.
PENDULUM: dict[str, tuple[str | None, ...]] = {
    "decision_transformer": ("decision_transformer/pendulum", "total_timesteps=3000", "checkpoint.every=1000"),
    "behavior_cloning": (
        *("behavior_cloning/pendulum", "total_timesteps=2000", "checkpoint.every=1000"),
        "data.top_fraction=0.1",
    ),
    "iql": ("iql/pendulum_random", "total_timesteps=6000", "checkpoint.every=2000"),
}
MUJOCO: dict[str, tuple[str | None, ...]] = {
    "decision_transformer": (None, "total_timesteps=3000", "checkpoint.every=1000"),
    "behavior_cloning": (
        None,
        *("algorithm=behavior_cloning", "data.top_fraction=0.1", "total_timesteps=2000", "checkpoint.every=1000"),
    ),
    "iql": (
        None,
        *("algorithm=iql", "data.return_source=rewards", "model.width=256", "optim.batch_size=256"),
        *("iql.temperature=3", "iql.expectile=0.7", "iql.discount=0.99"),
        *("total_timesteps=6000", "checkpoint.every=2000"),
    ),
}


class PublicPolicy:
    """One of the public policies, which were trained by others in the simulator."""

    def __init__(self, file: Path) -> None:
        with np.load(file, allow_pickle=False) as arrays:
            self.arrays = {name: arrays[name] for name in arrays.files}
        self.layers = [(self.arrays[f"w{i}"], self.arrays[f"b{i}"]) for i in range(int(self.arrays["num_layers"]))]

    def start(self, observations: np.ndarray, target_returns: np.ndarray) -> None:
        self.observations, self.step = observations, 0

    def act(self) -> np.ndarray:
        found, limit = self.arrays, int(self.arrays["time_limit"])
        values = np.asarray(self.observations, np.float32)
        if limit:  # one of them sees the share of the episode that is left
            values = np.pad(values, [(0, 0), (0, 1)], constant_values=1 - self.step / limit)
        if "mean" in found:
            limit = float(found["clip_obs"])
            values = np.clip((values - found["mean"]) / found["std"], -limit, limit)
        for weight, bias in self.layers[:-1]:
            values = values @ weight + bias
            values = np.maximum(values, 0) if str(found["activation"]) == "relu" else np.tanh(values)
        weight, bias = self.layers[-1]
        actions, low, high = values @ weight + bias, found["low"], found["high"]
        if str(found["squash"]) == "tanh":
            actions = low + (np.tanh(actions) + 1) / 2 * (high - low)
        return np.clip(actions, low, high).astype(np.float32)

    def observe(self, actions: np.ndarray, rewards: np.ndarray, observations: np.ndarray) -> None:
        self.observations, self.step = observations, self.step + 1

    def keep(self, episodes: Any) -> None:
        self.observations = self.observations[episodes]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Where everything lies, and by which seeds."""

    data: Path
    folder: Path
    seed: int
    first: int  # seed of the first episode

    def configured(self, name: str, log: Log, config: str | None, *settings: str | None) -> RunConfig:
        """The configuration of a run on a log."""
        usual = [
            *(f"name={name}-{self.seed}", f"storage_path={self.folder.absolute() / 'runs'}", f"seed={self.seed}"),
            *(f"env_id={log.env_id}", f"data.path={self.data.absolute() / log.path}", *log.settings),
            *("scaling.num_workers=0", "scaling.cpus_per_worker=1", "logging.every=500"),
            *("evaluation.every=0", "evaluation.num_episodes=1"),
        ]
        given = [each for each in settings if each is not None]
        return resolve_settings(read_settings(config, [*usual, *given])).config


def policies_on(name: str, log: Log, setting: Setting) -> Iterator[tuple[str, Policy, EvaluationConfig]]:
    """Each policy by its name, and how it is evaluated; trained first where it isn't there."""
    for kind, (config, *settings) in (MUJOCO if log.public else PENDULUM).items():
        run = trained(setting.configured(f"{name}-{kind}", log, config, *settings))
        targets = log.targets if kind == "decision_transformer" else log.targets[:1]
        for step in run.checkpoint_steps():
            policy, facts = load_policy(run.checkpoint(step))
            for target in targets:
                evaluation = replace(facts.evaluation, target_returns=(float(target),))
                yield f"{kind} {step} {target}", policy, evaluation
    for file in sorted((setting.data / "mujoco/policies").glob(f"{log.public}_*.npz")) if log.public else ():
        yield f"public {file.stem}", PublicPolicy(file), EvaluationConfig(target_returns=(0.0,))


def trained(config: RunConfig) -> RunFolder:
    run = RunFolder.of(config)
    if not run.read_summary():
        start_run(config, overwrite=True)
    return run


def kept(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text()) if file.exists() else {}


def measure_truth(name: str, log: Log, setting: Setting) -> dict[str, list[float]]:
    """The returns of all policies' episodes in the environment, by policy."""
    file = setting.folder / f"{name}-{setting.seed}-truth.json"
    found = kept(file)
    for policy_name, policy, evaluation in policies_on(name, log, setting):
        if policy_name in found:
            continue
        began = time.perf_counter()
        played = rollout(
            policy,
            log.env_id,
            seeds=range(setting.first, setting.first + NUM_EPISODES),
            target_returns=[evaluation.target_returns[0]] * NUM_EPISODES,
            max_timesteps=evaluation.max_timesteps,
        )
        found[policy_name] = played.returns.tolist()
        file.write_text(json.dumps(found))
        print(f"{name}: {policy_name}: {played.returns.mean():.1f} in {time.perf_counter() - began:.1f} s", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--logs", nargs="+", choices=LOGS, default=list(LOGS), metavar="NAME")
    parser.add_argument("--folder", type=Path, default=Path("offline"))
    parser.add_argument("--development", action="store_true", help="the seeds that settings were chosen by")
    options = parser.parse_args()
    torch.set_num_threads(1)  # small models: a second thread only waits
    seed, first = DEVELOPMENT if options.development else REPORT
    setting = Setting(data=options.data, folder=options.folder, seed=seed, first=first)
    options.folder.mkdir(parents=True, exist_ok=True)
    for name in options.logs:
        measure_truth(name, LOGS[name], setting)


if __name__ == "__main__":
    main()

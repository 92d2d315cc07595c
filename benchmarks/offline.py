"""How far an estimate of returns from the log alone can be trusted: beside the returns that the environment gives.

    python benchmarks/offline.py --data FOLDER [--logs NAME ...] [--folder DIR] [--development]

`FOLDER` has `pendulum_policies/` and `mujoco/`: logs, and public policies whose returns are known. Each log gets
policies of three kinds, most of them at several updates and target returns. The truth is 100 episodes each from seed
1000 on, and 1,000 for Pendulum. World models and policies have training seed 0. `--development` is what settings were
chosen by: training seed 7, and episodes from seed 2000 on. Everything lies in `--folder`, and what is there is not
computed again.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fitted_q import fitted_q
from kept import kept, trained
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr

from dt_ray.config.loading import read_settings
from dt_ray.config.schema import EvaluationConfig, OptimConfig, RunConfig
from dt_ray.data.logs.datasets import read_parts
from dt_ray.data.transitions import join_episodes
from dt_ray.jobs.deriving import resolve_settings
from dt_ray.jobs.offline import load_world
from dt_ray.learners.base import Policy
from dt_ray.offline.estimates import (
    MAX_DISAGREEMENT,
    World,
    choose_starts,
    estimate_return,
    estimate_returns,
    reasons_to_doubt,
    return_quantiles,
)
from dt_ray.play.held_out import evaluate_held_out
from dt_ray.play.rollout import rollout
from dt_ray.runs.checkpoint import load_learner, load_policy, read_facts
from dt_ray.runs.folder import checkpoint_at
from dt_ray.runs.offline_report import MOSTLY, Diagnostics
from dt_ray.runs.storage import Folder

NUM_NEIGHBOURS = 20  # logged episodes with returns nearest to the target: a baseline
NUM_TESTED, NUM_DRAWS = (1, 5, 20), 500  # real episodes of each policy; how often they are drawn
BEYOND = 0.1  # of the log's range: where impossible returns are planted
COLUMNS = ("estimate", "half_width", "nearest", "action_error", "wall_s")
TRAINING_SEED, DEVELOPMENT_SEED = 0, 7
FIRST_EPISODE = {0: 1000, 7: 2000}  # seed of the first episode of the truth, by training seed


@dataclass(frozen=True, kw_only=True)
class Log:
    env_id: str
    path: str  # in the folder of the data
    settings: tuple[str, ...] = ()  # of all runs on it
    targets: tuple[float, ...]
    public: str = ""  # the prefix of the public policies' files
    num_episodes: int = 100  # of the truth
    judges: str = ""  # the name of another log, whose policies are estimated from this one; else its own are
    runs_of: str = ""  # the name of another log, whose runs and world model are taken instead of own ones


LOGS = {
    "pendulum-mixed": Log(
        env_id="Pendulum-v1",
        num_episodes=1000,
        path="pendulum_policies/mixed.parquet",
        targets=(-130, -300, -600, -900),
    ),
    "pendulum-medium": Log(
        env_id="Pendulum-v1",
        num_episodes=1000,
        path="pendulum_policies/medium.parquet",
        targets=(-130, -300, -600, -900),
    ),
    "pendulum-random": Log(
        env_id="Pendulum-v1",
        num_episodes=1000,
        path="pendulum_policies/random.parquet",
        targets=(-300, -600, -900, -1300),
    ),
    "pendulum-narrow": Log(
        env_id="Pendulum-v1",
        num_episodes=1000,
        path="pendulum_policies/mixed.parquet",
        settings=("data.top_fraction=0.166",),  # the 100 best of 602 episodes
        targets=(-130, -300, -600, -900),
        judges="pendulum-mixed",
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
# One of many is chosen: all checkpoints of the runs above, asked for more target returns.
for name, targets in {
    "pendulum-mixed": (-50, -100, -130, -170, -200, -250, -300, -400, -500, -600, -750, -900),
    "pendulum-medium": (-50, -100, -130, -170, -200, -250, -300, -400, -500, -600, -750, -900),
    "pendulum-random": (-200, -300, -400, -500, -600, -700, -800, -900, -1000, -1100, -1200, -1300),
}.items():
    LOGS[f"{name}-choice"] = replace(LOGS[name], targets=targets, num_episodes=200, runs_of=name)

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
    seed: int  # of training

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
    if log.judges:
        yield from policies_on(log.judges, LOGS[log.judges], setting)
        return
    for kind, (config, *settings) in (MUJOCO if log.public else PENDULUM).items():
        run = trained(setting.configured(f"{log.runs_of or name}-{kind}", log, config, *settings))
        targets = log.targets if kind == "decision_transformer" else log.targets[:1]
        for step in run.checkpoint_steps():
            policy, facts = load_policy(run.checkpoint(step))
            for target in targets:
                evaluation = replace(facts.evaluation, target_returns=(float(target),))
                yield f"{kind} {step} {target}", policy, evaluation
    for file in sorted((setting.data / "mujoco/policies").glob(f"{log.public}_*.npz")) if log.public else ():
        yield f"public {file.stem}", PublicPolicy(file), EvaluationConfig(target_returns=(0.0,))


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
            seeds=range(FIRST_EPISODE[setting.seed], FIRST_EPISODE[setting.seed] + log.num_episodes),
            target_returns=[evaluation.target_returns[0]] * log.num_episodes,
            max_timesteps=evaluation.max_timesteps,
        )
        found[policy_name] = played.returns.tolist()
        file.write_text(json.dumps(found))
        print(f"{name}: {policy_name}: {played.returns.mean():.1f} in {time.perf_counter() - began:.1f} s", flush=True)
    return found


def world_checkpoint(name: str, log: Log, setting: Setting) -> Folder:
    """The newest checkpoint of a log's world model, which is trained where it isn't there."""
    config = setting.configured(f"{log.runs_of or name}-world", log, "world_model/neutral")
    return checkpoint_at(trained(config).folder)


def world_of(name: str, log: Log, setting: Setting) -> World:
    checkpoint = world_checkpoint(name, log, setting)
    return load_world(checkpoint, read_facts(checkpoint).spec)


def estimate_all(name: str, log: Log, setting: Setting) -> dict[str, dict[str, Any]]:
    """What is estimated of all policies from the log alone, by policy; baselines beside it."""
    file = setting.folder / f"{name}-{setting.seed}-estimates.json"
    found = kept(file)
    world = world_of(name, log, setting)
    returns = world.held_out.starts.returns
    for policy_name, policy, evaluation in policies_on(name, log, setting):
        if policy_name in found:
            continue
        began = time.perf_counter()
        starts = choose_starts(world.held_out.starts.observations, evaluation)
        quantiles = return_quantiles(world, starts)
        is_asked = getattr(policy, "return_scale", 0.0) != 0.0
        target = evaluation.target_returns[0]
        estimated = estimate_return(
            policy, world, starts, quantiles, evaluation, target_return=target, is_asked=is_asked
        )
        wall_s = time.perf_counter() - began
        nearest = world.held_out.starts.nearest(target, NUM_NEIGHBOURS) if is_asked else np.arange(len(returns))
        replayed = evaluate_held_out(policy, world.held_out, evaluation, step=0).held_out
        assert replayed is not None
        found[policy_name] = {
            **asdict(estimated.diagnostics),
            "supported_share": estimated.supported_share,
            "nearest": float(returns[nearest].mean()),
            "action_error": replayed.action_error,
            "range": float(returns.max() - returns.min()),
            "wall_s": round(wall_s, 2),
        }
        file.write_text(json.dumps(found, indent=1))
        print(f"{name}: {policy_name}: estimated {estimated.diagnostics.estimate:.1f} in {wall_s:.1f} s", flush=True)
    return found


def fit_all(name: str, log: Log, setting: Setting) -> dict[str, dict[str, Any]]:
    """What fitted Q evaluation estimates of the same policies, by policy."""
    file = setting.folder / f"{name}-{setting.seed}-fitted-q.json"
    found = kept(file)
    learner, config = load_learner(world_checkpoint(name, log, setting), optim=OptimConfig())
    episodes = join_episodes(list(read_parts(config.data, learner.spec)))
    for policy_name, policy, evaluation in policies_on(name, log, setting):
        if policy_name in found:
            continue
        began, target = time.perf_counter(), evaluation.target_returns[0]
        longest = evaluation.max_timesteps
        fitted = fitted_q(policy, episodes, learner.normalizer, target_return=target, max_timesteps=longest)
        found[policy_name] = {**asdict(fitted), "wall_s": round(time.perf_counter() - began, 2)}
        file.write_text(json.dumps(found, indent=1))
        print(f"{name}: {policy_name}: fitted {fitted.estimate:.1f} ± {fitted.half_width:.1f}", flush=True)
    return found


def show_fitted(
    name: str, truth: Mapping[str, list[float]], fitted: Mapping[str, dict[str, Any]], width: float
) -> None:
    """The figures of `figures_of` for fitted Q evaluation, of all policies and of those on which its members agree."""
    agreed = [policy for policy in fitted if fitted[policy]["disagreement"] <= MAX_DISAGREEMENT]
    for kind, policies in {"all": list(fitted), "agreed on": agreed}.items():
        if len(policies) < 2:
            continue
        true = np.array([np.mean(truth[policy]) for policy in policies])
        values, halves, seconds = (
            np.array([fitted[policy][key] for policy in policies]) for key in ("estimate", "half_width", "wall_s")
        )
        errors = np.abs(values - true)
        print(
            f"{name}, fitted Q evaluation, {kind} ({len(policies)}): "
            f"rank correlation {spearmanr(values, true)[0]:.3f}; mean error {errors.mean() / width:.1%} of the range; "
            f"interval covers {(errors <= halves).mean():.0%}; "
            f"regret of its choice {(true.max() - true[values.argmax()]) / width:.1%}; {seconds.mean():.1f} s a policy"
        )


def show(name: str, truth: Mapping[str, list[float]], estimates: Mapping[str, Mapping[str, Any]]) -> None:
    """A table of all policies of a log, and the figures by which an estimate is judged."""
    policies = [policy for policy in truth if policy in estimates]
    doubts = {policy: doubts_of(estimates[policy]) for policy in policies}
    table = Table(title=name)
    for column in ("policy", "true", "estimated", "± 90%", "disagreement", "verdict"):
        table.add_column(column, justify="left" if column in ("policy", "verdict") else "right")
    for policy in policies:
        found, true = estimates[policy], float(np.mean(truth[policy]))
        is_covered = abs(found["estimate"] - true) <= found["half_width"]
        verdict = ("doubted" if doubts[policy] else "believed") + ("" if is_covered else ", true return outside")
        cells = (
            f"{true:.0f}",
            f"{found['estimate']:.0f}",
            f"{found['half_width']:.0f}",
            f"{found['disagreement']:.1f}",
        )
        table.add_row(policy, *cells, verdict)
    console = Console(width=120)
    console.print(table)
    kinds = {"all": policies, "believed": [each for each in policies if not doubts[each]]}
    kinds["public"] = [each for each in policies if each.startswith("public")]
    for kind, chosen in kinds.items():
        if len(chosen) > 1:
            console.print(f"{name}, {kind} ({len(chosen)}): {figures_of(chosen, truth, estimates)}")


def doubts_of(found: Mapping[str, Any]) -> list[str]:
    names = [field.name for field in fields(Diagnostics)]
    return reasons_to_doubt(Diagnostics(**{name: found[name] for name in names}), found["range"])


def figures_of(
    policies: list[str], truth: Mapping[str, list[float]], estimates: Mapping[str, Mapping[str, Any]]
) -> str:
    """Rank correlation, mean error and coverage of the estimates, and the ranks of the baselines."""
    true = np.array([np.mean(truth[each]) for each in policies])
    columns = {key: np.array([estimates[each][key] for each in policies]) for key in COLUMNS}
    errors, width = np.abs(columns["estimate"] - true), estimates[policies[0]]["range"]
    ranks = {"estimate": columns["estimate"], "nearest episodes": columns["nearest"]}
    ranks["action error"] = -columns["action_error"]
    ranked = ", ".join(f"{key} {spearmanr(values, true)[0]:.3f}" for key, values in ranks.items())
    best, chosen = true.max(), true[columns["estimate"].argmax()]
    return (
        f"rank correlation: {ranked}; mean error {errors.mean():.0f} ({errors.mean() / width:.1%} of the range; "
        f"nearest episodes {np.abs(columns['nearest'] - true).mean() / width:.1%}); "
        f"interval covers {(errors <= columns['half_width']).mean():.0%}; regret of its choice "
        f"{(best - chosen) / width:.1%}; {columns['wall_s'].mean():.1f} s a policy"
    )


def regret_of_estimates(truth: Mapping[str, list[float]], estimates: Mapping[str, Mapping[str, Any]]) -> str:
    """What choosing the policy with the highest estimate costs, as a share of the log's range."""
    true = {policy: float(np.mean(returns)) for policy, returns in truth.items() if policy in estimates}
    believed = [policy for policy in true if not doubts_of(estimates[policy])]
    shares = {policy: found["supported_share"] for policy, found in estimates.items()}
    backed = [policy for policy in believed if shares[policy] is None or shares[policy] >= MOSTLY]
    found = []
    for kind, policies in {"any": list(true), "believed": believed, "believed and backed": backed}.items():
        if not policies:
            found.append(f"{kind}: none")
            continue
        chosen = max(policies, key=lambda policy: estimates[policy]["estimate"])
        regret = (max(true.values()) - true[chosen]) / estimates[chosen]["range"]
        found.append(f"{kind} ({len(policies)}): {regret:.1%} ({chosen})")
    return ", ".join(found)


def regret_of_testing(truth: Mapping[str, list[float]], width: float) -> str:
    """What choosing the best policy by some real episodes each costs on average, as a share of the log's range."""
    random = np.random.default_rng(0)
    returns = np.array(list(truth.values()))  # [policies, episodes]
    means, found = returns.mean(axis=1), []
    for num in NUM_TESTED:
        drawn = random.integers(returns.shape[1], size=(NUM_DRAWS, len(returns), num))
        tested = np.take_along_axis(returns[None], drawn, axis=2).mean(axis=2)
        found.append(f"{num}: {(means.max() - means[tested.argmax(axis=1)]).mean() / width:.1%}")
    return ", ".join(found)


def show_support(name: str, world: World) -> None:
    """How many returns of held-out starts, and of impossible ones, are said not to be supported."""
    data, starts = world.held_out.episodes, world.held_out.starts
    quantiles = return_quantiles(world, data.observations[data.starts])
    logged = data.episode_returns
    beyond = float(np.ptp(starts.returns)) * BEYOND
    outside = [
        np.mean((target < quantiles[:, 0]) | (target > quantiles[:, -1]))
        for target in (logged, starts.returns.max() + beyond, starts.returns.min() - beyond)
    ]
    print(
        f"{name}: of {len(logged)} held-out episodes the returns of {outside[0]:.0%} are said not to be supported; "
        f"of returns {BEYOND:.0%} of the range above the log's best {outside[1]:.0%}, below its worst {outside[2]:.0%}"
    )


def show_recommended(name: str, log: Log, setting: Setting, world: World) -> None:
    """What the recommended target return gives in the environment, beside all others that were estimated."""
    file = setting.folder / f"{name}-{setting.seed}-recommended.json"
    found = kept(file)
    if not found:
        kind = "decision_transformer"
        config, *settings = (MUJOCO if log.public else PENDULUM)[kind]
        run = trained(setting.configured(f"{name}-{kind}", log, config, *settings))
        policy, facts = load_policy(checkpoint_at(run.folder))
        evaluation = replace(facts.evaluation, target_returns=tuple(map(float, log.targets)))
        report = estimate_returns(policy, world, evaluation, step=facts.step)
        targets = [target.target_return for target in report.targets]
        seeds = range(FIRST_EPISODE[setting.seed], FIRST_EPISODE[setting.seed] + log.num_episodes)
        longest = evaluation.max_timesteps
        returns = {
            target: rollout(
                policy, log.env_id, seeds=seeds, target_returns=[target] * len(seeds), max_timesteps=longest
            ).returns.mean()
            for target in targets
        }
        found = {"recommended": report.best_target, "returns": {str(each): returns[each] for each in targets}}
        file.write_text(json.dumps(found, indent=1))
    returns, width = found["returns"], float(np.ptp(world.held_out.starts.returns))
    best = max(returns, key=lambda target: returns[target])
    chosen = found["recommended"]
    reached = "nothing is recommended" if chosen is None else (
        f"auto is {chosen:g}, which reaches {returns[str(chosen)]:.0f}, "
        f"{(returns[best] - returns[str(chosen)]) / width:.1%} of the range less"
    )  # fmt: skip
    print(f"{name}: of {len(returns)} target returns {best} reaches most, {returns[best]:.0f}; {reached}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--logs", nargs="+", choices=LOGS, default=list(LOGS), metavar="NAME")
    parser.add_argument("--folder", type=Path, default=Path("offline"))
    parser.add_argument("--fitted-q", action="store_true", help="also by fitted Q evaluation: a fit for each policy")
    parser.add_argument("--development", action="store_true", help="the seeds that settings were chosen by")
    options = parser.parse_args()
    torch.set_num_threads(1)  # small models: a second thread only waits
    seed = DEVELOPMENT_SEED if options.development else TRAINING_SEED
    setting = Setting(data=options.data, folder=options.folder, seed=seed)
    options.folder.mkdir(parents=True, exist_ok=True)
    for name in options.logs:
        truth = measure_truth(name, LOGS[name], setting)
        estimates = estimate_all(name, LOGS[name], setting)
        show(name, truth, estimates)
        width = next(iter(estimates.values()))["range"]
        if options.fitted_q:
            show_fitted(name, truth, fit_all(name, LOGS[name], setting), width)
        print(f"{name}: regret of choosing one of {len(truth)} by estimates: {regret_of_estimates(truth, estimates)}")
        print(f"{name}: regret of choosing by real episodes of each policy: {regret_of_testing(truth, width)}")
        world = world_of(name, LOGS[name], setting)
        show_support(name, world)
        if not LOGS[name].judges and not LOGS[name].runs_of:
            show_recommended(name, LOGS[name], setting, world)


if __name__ == "__main__":
    main()

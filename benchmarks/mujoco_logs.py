"""Every learner on MuJoCo's logs of several qualities, by one configuration, beside d3rlpy's: scores and obedience.

    python benchmarks/mujoco_logs.py --data FOLDER [--logs NAME ...] [--learners NAME ...] [--seeds N] [--updates N]
    python benchmarks/mujoco_logs.py --minari --logs hopper-medium
    python benchmarks/mujoco_logs.py --log mine Hopper-v5 LOG
    python benchmarks/mujoco_logs.py --data FOLDER --logs hopper-ladder --speed

`FOLDER` has `Hopper/medium.parquet`, `expert.parquet` and `ladder.parquet`, and as much of Walker2d and HalfCheetah;
`--minari` takes Farama's own, a `--log` is a file, a folder or `minari:ID`. All learners make as many updates on the
same steps, whatever the log, and are asked for its best return on episodes with the seeds 1000 to 1019; d3rlpy's are
left out where it is not installed. Everything lies in `--folder`, and what is there is not computed again.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from kept import kept, trained
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from dt_ray.config.loading import read_settings
from dt_ray.config.schema import RunConfig
from dt_ray.data import TransitionDataset, read_dataset
from dt_ray.data.spaces import read_spaces
from dt_ray.environments.reference_returns import reference_returns
from dt_ray.jobs.deriving import resolve_settings
from dt_ray.play.evaluation import evaluate
from dt_ray.reports.figures import draw_obedience, save_figure
from dt_ray.runs.checkpoint import load_policy
from dt_ray.runs.folder import checkpoint_at

FIRST_EPISODE, NUM_EPISODES = 1000, 20
NUM_ROUNDS, NUM_BARE_STEPS = 5, 5000  # of speeds
NUM_TARGETS, SUPPORT = 7, (0.02, 0.98)  # quantiles of the log's returns, by steps, between which targets are spread
ENVIRONMENTS = {"hopper": "Hopper-v5", "walker2d": "Walker2d-v5", "half-cheetah": "HalfCheetah-v5"}
KINDS = {"medium": ["medium"], "expert": ["expert"], "medium-expert": ["medium", "expert"], "ladder": ["ladder"]}
MINARI = {"half-cheetah": "halfcheetah"}  # its names, where they are others

D3RLPY = ("d3rlpy_decision_transformer", "d3rlpy_iql")
IQL = (
    *("algorithm=iql", "data.return_source=rewards", "model.width=256", "optim.batch_size=256"),
    *("iql.temperature=3", "iql.expectile=0.7", "iql.discount=0.99", "optim.learning_rate=3e-4"),
    *("optim.gradient_clip=null", "optim.weight_decay=0", "optim.warmup_steps=0"),
)
# One step of context: chosen on the ladders, training seed 7, episodes from 2000 on (docs/mujoco.md).
TRANSFORMER = ("model.context_length=1", "model.dropout=0", "optim.batch_size=256")
PLAYED = {  # of which the speed of evaluation is measured
    "context 1": (),
    "context 20, window": ("model.context_length=20",),
    "context 20, band": ("model.context_length=20", "model.attention=band"),
}
LEARNERS: dict[str, tuple[str, ...]] = {
    "decision_transformer": TRANSFORMER,
    "values": (*IQL, "iql.discount=0.999"),  # for the next; targets are not discounted, so values are as good as not
    "relabeled": (*TRANSFORMER, "data.return_source=value"),
    "behavior_cloning": (*TRANSFORMER, "algorithm=behavior_cloning"),
    "best_tenth": (*TRANSFORMER, "algorithm=behavior_cloning", "data.top_fraction=0.1"),
    "iql": IQL,
}


@dataclass(frozen=True, kw_only=True)
class Log:
    name: str
    env_id: str
    paths: tuple[str, ...]

    @property
    def data_settings(self) -> list[str]:
        """Settings of a run on it; of several parts an equal share of the windows is drawn."""
        if len(self.paths) == 1:
            return [f"data.path={self.paths[0]}"]
        return [f"data.mix={json.dumps(dict.fromkeys(self.paths, 1))}"]

    def trains(self, learners: Sequence[str]) -> list[str]:
        """Those of the learners that it can train: the best tenth of two parts would be the better part's."""
        return [each for each in learners if each != "best_tenth" or len(self.paths) == 1]

    def read(self) -> list[TransitionDataset]:
        spec = read_spaces(self.env_id)
        configs = [read_settings(None, [f"env_id={self.env_id}", f"data.path={path}"]) for path in self.paths]
        return [read_dataset(resolve_settings(config).config.data, spec) for config in configs]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Where everything lies, and how much of it there is."""

    folder: Path
    num_updates: int
    num_seeds: int

    def configured(self, log: Log, learner: str, seed: int, *settings: str) -> RunConfig:
        name = "-".join([log.name, learner, *settings, str(self.num_updates), str(seed)])
        values = self.configured(log, "values", seed) if learner == "relabeled" else None
        usual = [
            *(f"name={name}", f"storage_path={self.folder.absolute() / 'runs'}", f"seed={seed}"),
            *(f"env_id={log.env_id}", *log.data_settings, f"total_timesteps={self.num_updates}"),
            *("scaling.num_workers=0", "scaling.cpus_per_worker=1", "logging.every=500"),
            *("evaluation.every=0", "evaluation.num_episodes=1", "checkpoint.every=0"),
            *([] if values is None else [f"data.values={trained(values).folder}"]),
        ]
        return resolve_settings(read_settings(None, [*usual, *LEARNERS[learner], *settings])).config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--data", type=Path, metavar="FOLDER")
    where.add_argument("--minari", action="store_true", help="Farama's logs, medium and expert")
    where.add_argument("--log", nargs=3, metavar=("NAME", "ENV_ID", "LOG"))
    parser.add_argument("--logs", nargs="+", metavar="NAME", help="of these only")
    parser.add_argument("--learners", nargs="+", metavar="NAME", choices=[*LEARNERS, *D3RLPY], help="of these only")
    parser.add_argument("--seeds", type=int, default=3, help="training seeds")
    parser.add_argument("--updates", type=int, default=12_000)
    parser.add_argument("--folder", type=Path, default=Path("mujoco"))
    parser.add_argument("--plot", metavar="FILE", help="the scores that are asked for and reached")
    parser.add_argument("--speed", action="store_true", help="evaluation's environment steps a second, and no scores")
    options = parser.parse_args()
    torch.set_num_threads(1)  # small models: a second thread only waits
    logs = {log.name: log for log in named_logs(options)}
    chosen = [logs[name] for name in options.logs or logs]
    setting = Setting(folder=options.folder, num_updates=options.updates, num_seeds=options.seeds)
    options.folder.mkdir(parents=True, exist_ok=True)
    learners = [each for each in options.learners or [*LEARNERS, *D3RLPY] if each != "values"]
    missing = [each for each in learners if each in D3RLPY and find_spec("d3rlpy") is None]
    if missing:
        print(f"d3rlpy is not installed here (make bench): without {', '.join(missing)}")
    learners = [each for each in learners if each not in missing]
    if options.speed:
        for log in chosen:
            show_speed(log, setting)
        return
    for log in chosen:
        for seed in range(setting.num_seeds):
            for learner in log.trains(learners):
                measure(log, learner, seed, setting)
    show_scores(chosen, learners, setting)
    if "decision_transformer" in learners:
        for log in chosen:
            show_obedience(log, setting)
        if options.plot:
            save_figure(draw_scores(chosen, setting), options.plot)


def named_logs(options: argparse.Namespace) -> Iterator[Log]:
    if options.log:
        name, env_id, path = options.log
        yield Log(name=name, env_id=env_id, paths=(path,))
        return
    for short, env_id in ENVIRONMENTS.items():
        for kind, parts in KINDS.items():
            if options.minari:
                paths = [f"minari:mujoco/{MINARI.get(short, short)}/{part}-v0" for part in parts]
            else:
                paths = [str(options.data.absolute() / env_id.partition("-")[0] / f"{part}.parquet") for part in parts]
            if not (options.minari and kind == "ladder"):
                yield Log(name=f"{short}-{kind}", env_id=env_id, paths=tuple(paths))


def measure(log: Log, learner: str, seed: int, setting: Setting) -> dict[str, Any]:
    """Trains a learner where that was not done, and plays the episodes."""
    file = setting.folder / f"{log.name}-{learner}-{setting.num_updates}-{seed}.json"
    found = kept(file)
    if not found:
        play = play_theirs if learner in D3RLPY else play_ours
        found = play(log, learner, seed, setting)
        file.write_text(json.dumps(found))
        best = np.mean(next(iter(found["returns"].values())))
        print(f"{log.name}: {learner}, seed {seed}: {best:.0f} in {found['train_s']:.0f} + {found['play_s']:.0f} s")
    return found


def play_ours(log: Log, learner: str, seed: int, setting: Setting) -> dict[str, Any]:
    config = setting.configured(log, learner, seed)
    run = trained(config)
    returns = logged_returns(log)
    targets = spread_targets(returns) if learner in ("decision_transformer", "relabeled") else [float(returns.max())]
    evaluation = replace(
        config.evaluation, target_returns=tuple(targets), seed=FIRST_EPISODE, num_episodes=NUM_EPISODES
    )
    policy, facts = load_policy(checkpoint_at(run.folder))
    report = evaluate(policy, log.env_id, evaluation, step=facts.step)
    return {
        "returns": {f"{each.target_return:g}": each.episode_returns for each in report.targets},
        "train_s": (run.read_summary() or {})["train_wall_s"],
        "play_s": report.wall_s,
        "steps_per_s": report.env_steps_per_s,
        "width": float(np.ptp(returns)),
    }


def play_theirs(
    log: Log, learner: str, seed: int, setting: Setting, *, num_episodes: int = NUM_EPISODES
) -> dict[str, Any]:
    import mujoco_d3rlpy  # needs d3rlpy

    playing = {"d3rlpy_decision_transformer": mujoco_d3rlpy.play_transformer, "d3rlpy_iql": mujoco_d3rlpy.play_iql}
    episodes = range(FIRST_EPISODE, FIRST_EPISODE + num_episodes)
    return playing[learner](log.read(), log.env_id, seed=seed, num_updates=setting.num_updates, episodes=episodes)


def logged_returns(log: Log) -> np.ndarray:
    """Of all episodes, each as often as it has steps."""
    parts = log.read()
    return np.concatenate([np.repeat(part.episode_returns, part.lengths) for part in parts])


def spread_targets(returns: np.ndarray) -> list[float]:
    """The log's best return, and numbers from high to low between quantiles of its returns."""
    low, high = np.quantile(returns, SUPPORT)
    return [float(returns.max()), *np.linspace(high, low, NUM_TARGETS).round().tolist()]


def show_scores(logs: Sequence[Log], learners: Sequence[str], setting: Setting) -> None:
    """D4RL's score of each learner: the mean over training seeds, and that of each."""
    shown = Table(
        title=f"D4RL score, {setting.num_updates} updates, {NUM_EPISODES} episodes, {setting.num_seeds} seed(s)"
    )
    shown.add_column("log")
    for learner in learners:
        shown.add_column(learner, justify="right")
    seconds: dict[str, list[float]] = {learner: [] for learner in learners}
    for log in logs:
        cells = []
        for learner in learners:
            if learner not in log.trains([learner]):
                cells.append("–")
                continue
            results = [measure(log, learner, seed, setting) for seed in range(setting.num_seeds)]
            seconds[learner] += [result["train_s"] for result in results]
            scores = [score(log, next(iter(result["returns"].values()))) for result in results]
            each = "" if len(scores) == 1 else f" ({', '.join(f'{one:.0f}' for one in scores)})"
            cells.append(f"{np.mean(scores):.1f}{each}")
        shown.add_row(log.name, *cells)
    shown.add_row("training, s", *(f"{np.mean(each):.0f}" if each else "–" for each in seconds.values()))
    Console(width=200).print(shown)


def score(log: Log, returns: Sequence[float] | np.ndarray) -> float:
    """D4RL's, of the mean of these returns; that mean where nobody has published any."""
    mean, known = float(np.mean(returns)), reference_returns(log.env_id)
    return 100 * (mean - known.random) / (known.reference - known.random) if known else mean


def show_obedience(log: Log, setting: Setting) -> None:
    """How far episodes end from what was asked, of all training seeds together, and as a share of the log's range."""
    shown = Table(title=f"{log.name}: decision_transformer, {setting.num_updates} updates")
    for column in ("asked", "reached", "score", "off by, median", "90%", "median / range", "90% / range"):
        shown.add_column(column, justify="right")
    results = [measure(log, "decision_transformer", seed, setting) for seed in range(setting.num_seeds)]
    width = results[0]["width"]
    for place, target in enumerate(results[0]["returns"]):
        returns = np.concatenate([list(result["returns"].values())[place] for result in results])
        off = np.quantile(np.abs(returns - float(target)), [0.5, 0.9])
        shares = [f"{each / width:.1%}" for each in off]
        shown.add_row(
            target, f"{returns.mean():.0f}", f"{score(log, returns):.1f}", *(f"{each:.0f}" for each in off), *shares
        )
    Console(width=120).print(shown)


def draw_scores(logs: Sequence[Log], setting: Setting) -> Figure:
    """The mean scores that are reached, with 95% intervals over all episodes, against those that are asked for."""
    found: dict[str, dict[float, np.ndarray]] = {}
    for log in logs:
        results = [measure(log, "decision_transformer", seed, setting)["returns"] for seed in range(setting.num_seeds)]
        found[log.name] = {
            score(log, [float(target)]): np.array([[score(log, [each]) for one in results for each in one[target]]])
            for target in results[0]
        }
    figure = draw_obedience(found)
    figure.axes[0].set(xlabel="target return (D4RL score)", ylabel="return reached (D4RL score)")
    return figure


def show_speed(log: Log, setting: Setting) -> None:
    """Environment steps a second with a policy in the loop, and in the bare environment, taken in turns."""
    setting = replace(setting, num_updates=1)  # what it has learned makes no difference
    rates = {"bare environment": lambda: bare_rate(log)}
    for name, settings in PLAYED.items():
        rates[name] = partial(our_rate, log, setting.configured(log, "decision_transformer", 0, *settings))
    if find_spec("d3rlpy"):
        rates["d3rlpy"] = lambda: play_theirs(log, D3RLPY[0], 0, setting, num_episodes=1)["steps_per_s"]
    found = {name: [] for name in rates}
    for _ in range(NUM_ROUNDS):
        for name, rate in rates.items():
            found[name].append(rate())
    bare = np.median(found["bare environment"])
    for name, each in found.items():
        rate = np.median(each)
        print(f"{log.name}: {name}: {rate:.0f} steps a second, {rate / bare:.3f} of the bare environment's")


def bare_rate(log: Log) -> float:
    env, num_actions = gym.make(log.env_id).unwrapped, read_spaces(log.env_id).action_dim
    actions = np.random.default_rng(0).uniform(-1, 1, (NUM_BARE_STEPS, num_actions)).astype(np.float32)
    env.reset(seed=0)
    began = time.perf_counter()
    for action in actions:
        _, _, terminated, truncated, _ = env.step(action)
        if terminated or truncated:
            env.reset()
    return len(actions) / (time.perf_counter() - began)


def our_rate(log: Log, config: RunConfig) -> float:
    policy, facts = load_policy(checkpoint_at(trained(config).folder))
    evaluation = replace(config.evaluation, target_returns=(0.0,) * 4, seed=FIRST_EPISODE, num_episodes=NUM_EPISODES)
    return evaluate(policy, log.env_id, evaluation, step=facts.step).env_steps_per_s


if __name__ == "__main__":
    main()

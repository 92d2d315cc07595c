"""Makes, imports, describes and checks datasets.

python -m dt_ray.data collect --behavior mixed --episodes 600 --out data/pendulum-mixed
python -m dt_ray.data collect --env MyEnv-v0 --behavior my_module:act --out data/mine
python -m dt_ray.data import rows.csv --out data/mine --column observation=x,y,theta --column action=torque
python -m dt_ray.data import minari:mujoco/hopper/medium-v0 --out data/hopper
python -m dt_ray.data describe data/pendulum-mixed --out look
python -m dt_ray.data validate data/pendulum-mixed --env Pendulum-v1

SOURCE and DATASET: Parquet or CSV with a row per step, Parquet with a row per episode, and the logs of Minari, D4RL,
d3rlpy, RLlib, LeRobot, imitation and the original Decision Transformer. Training reads all of them; importing packs
them once.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from dt_ray.cli.command import add_modules_argument, show_log, target_return
from dt_ray.cli.data_options import action_bounds_of, data_config_of, env_kwargs_of

if TYPE_CHECKING:
    import pyarrow as pa

    from dt_ray.data.spaces import SpaceSpec
    from dt_ray.data.transitions import TransitionDataset

SMALL = 2**26  # bytes of a log that is imported before Ray would have started


def main(arguments: Sequence[str]) -> None:
    options = make_parser().parse_args(arguments)
    show_log()
    options.run(options)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m dt_ray.data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="collect|import|describe|validate")

    collect = commands.add_parser("collect", help="play episodes in an environment and write them")
    _add_collect_arguments(collect)
    for name, run, text in (
        ("import", import_dataset, "pack a log into a dataset of episodes"),
        ("describe", describe, "say what a log holds, and which episodes are unlike the others"),
        ("validate", validate, "look for faults"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("path", metavar="SOURCE" if name == "import" else "DATASET")
        _add_log_arguments(command)
        command.set_defaults(run=run)
        if name == "describe":
            command.add_argument("--out", metavar="DIR", help="write the page with its pictures and tables")
            command.add_argument("--json", metavar="FILE", help="write all that is printed as JSON")
            command.add_argument("--plot", metavar="FILE", help="draw the histogram of returns (PNG, SVG or PDF)")
        else:
            command.add_argument("--clip", action="store_true", help="clip actions to the bounds of --env")
    for command in (collect, commands.choices["import"]):
        command.add_argument("--out", required=True, metavar="DIR")
        command.add_argument("--overwrite", action="store_true", help="replace the folder")
        command.add_argument("--licence", metavar="TEXT", help="for the card beside the dataset, DIR.README.md")
    return parser


def _add_collect_arguments(collect: argparse.ArgumentParser) -> None:
    collect.add_argument("--env", default="Pendulum-v1", metavar="ID")
    collect.add_argument(
        "--behavior",
        default="random",
        metavar="NAME",
        help="random; for Pendulum expert, medium or mixed; a run or checkpoint of ours; module:function",
    )
    collect.add_argument("--episodes", type=int, default=100, metavar="N")
    collect.add_argument(
        "--seed", type=int, default=100_000, metavar="S", help="episode i resets with seed + i; 10000 or more"
    )
    collect.add_argument(
        "--max-timesteps", type=int, default=1000, metavar="T", help="cut episodes after so many steps"
    )
    collect.add_argument("--target-return", type=target_return, metavar="R", help="what to ask of a checkpoint, or max")
    collect.add_argument("--max-envs", type=int, default=100, metavar="N", help="environments open at once")
    collect.add_argument(
        "--action-bounds", metavar="[[LOW …],[HIGH …]]", help="of random actions, where the environment has none"
    )
    collect.add_argument("--flat", action="store_true", help="write a row per step instead of a row per episode")
    _add_env_kwargs(collect)
    _add_cluster_arguments(collect)
    add_modules_argument(collect)
    collect.set_defaults(run=collect_episodes)


def _add_log_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--column",
        action="append",
        default=[],
        metavar="OURS=THEIRS",
        help="name of a column, or names with commas between them; nothing after the =: it isn't read",
    )
    files = command.add_mutually_exclusive_group()
    files.add_argument(
        "--episodes-across-files",
        choices=("auto", "true", "false"),
        default="auto",
        help="whether an episode id in several files is one episode; auto: where the log says so",
    )
    files.add_argument("--episode-per-file", action="store_true", help="each file is one episode")
    command.add_argument(
        "--action-scale", type=float, default=1.0, metavar="X", help="environment action = logged action * X"
    )
    command.add_argument("--format", metavar="NAME", help="minari, lerobot, parquet, …; found out by itself")
    command.add_argument(
        "--time-limit", type=int, metavar="T", help="episodes that end at step T were cut, whatever the log says"
    )
    _add_cluster_arguments(command)
    command.add_argument("--env", metavar="ID", help="check dimensions, bounds and dynamics against this one")
    _add_env_kwargs(command)


def _add_env_kwargs(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--env-kwargs", metavar="{NAME: VALUE}", help="arguments of the constructor of --env, as YAML reads them"
    )


def _add_cluster_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--workers", type=int, metavar="N", help="0: in this process, without Ray (small logs are)")
    command.add_argument("--verbose", action="store_true", help="show Ray's own messages too")


def collect_episodes(options: argparse.Namespace) -> None:
    from dt_ray.config.modules import allow_modules
    from dt_ray.data.spaces import choose_bounds, read_spaces
    from dt_ray.errors import UserError
    from dt_ray.play.collection import CollectionPlan, collect_here

    allow_modules(options.env)
    env_kwargs, bounds = env_kwargs_of(options), None
    if options.max_envs < 1:
        raise UserError(f"--max-envs is at least 1, got {options.max_envs}")
    if options.action_bounds:
        spec = read_spaces(options.env, env_kwargs)
        bounds = choose_bounds(spec, action_bounds_of(options.action_bounds), env_id=options.env)
    plan = CollectionPlan(
        env_id=options.env,
        env_kwargs=env_kwargs,
        max_envs=options.max_envs,
        spec=bounds,
        behavior=options.behavior,
        num_episodes=options.episodes,
        seed=options.seed,
        max_timesteps=options.max_timesteps,
        target_return=options.target_return,
    )
    plan.check()
    with _cluster(options):
        if options.workers == 0:
            tables = collect_here(plan)
        else:
            from dt_ray.distributed.collect import collect_on_ray

            tables = collect_on_ray(plan, num_workers=options.workers)
        _write(options, tables, source=plan.source)


def import_dataset(options: argparse.Namespace) -> None:
    from dt_ray.data.logs.episodes import to_table
    from dt_ray.data.spaces import read_spaces

    spec = read_spaces(options.env, env_kwargs_of(options)) if options.env else None
    facts = {"env_id": options.env} if spec else {}
    if spec and spec.is_bounded:
        facts |= {"action_low": spec.action_low, "action_high": spec.action_high}
    with _parts(options, spec) as parts:
        _write(options, (to_table(part, facts) for part in parts), source=options.path)


def _write(options: argparse.Namespace, tables: Iterable[pa.Table], *, source: str) -> None:
    from dt_ray.play.collection import write_dataset

    flat = getattr(options, "flat", False)
    summary = write_dataset(
        options.out, tables, source=source, licence=options.licence, flat=flat, overwrite=options.overwrite
    )
    rows = summary.rows()
    print(f"wrote {rows['episodes']} episodes of {rows['steps']} steps to {options.out}")


@contextmanager
def _parts(options: argparse.Namespace, spec: SpaceSpec | None) -> Iterator[Iterator[TransitionDataset]]:
    """The checked episodes of the dataset, part by part; Ray's tasks read them, or this process if the log is small."""
    from dt_ray.data.logs.datasets import read_parts
    from dt_ray.data.logs.episodes import from_table
    from dt_ray.data.logs.files import find_files

    config = data_config_of(options)
    if options.workers is None and not config.is_function:
        size = sum(file.size for file in find_files(config.path, config.format))
        options.workers = 0 if size < SMALL else None
    with _cluster(options):
        if options.workers == 0:
            yield read_parts(config, spec)
        else:
            from dt_ray.distributed.data import episode_tables

            yield (from_table(table, source=options.path) for table in episode_tables(config, spec))


@contextmanager
def _cluster(options: argparse.Namespace) -> Iterator[None]:
    if options.workers == 0:
        yield
        return
    from dt_ray.distributed.cluster import connection

    with connection(verbose=options.verbose):
        yield


def describe(options: argparse.Namespace) -> None:
    from dt_ray.cli.description import gather, print_description, write_description
    from dt_ray.data.description.clocks import read_clock
    from dt_ray.data.logs.sources import sound_files_here

    config = data_config_of(options)
    with _parts(options, None) as parts:
        files = sound_files_here(config, None)[0]
        if options.workers == 0:
            clocks = [read_clock(file, config) for file in files]
        else:
            from dt_ray.distributed.data import read_clocks

            clocks = read_clocks(files, config)
        log, command = gather(parts, files, clocks, config, env_id=options.env, env_kwargs=env_kwargs_of(options))
    print_description(log, command)
    write_description(log, command, out=options.out, json_file=options.json, plot=options.plot)


def validate(options: argparse.Namespace) -> None:
    from dt_ray.data.description.traps import LogFacts, log_traps, step_traps
    from dt_ray.data.ranges import constant_columns
    from dt_ray.data.spaces import read_spaces
    from dt_ray.environments.batched import known_state_of
    from dt_ray.errors import DataError

    env_kwargs, columns = env_kwargs_of(options), data_config_of(options).columns
    spec = read_spaces(options.env, env_kwargs) if options.env else None
    facts: LogFacts | None = None
    part_traps: list[str] = []
    with _parts(options, spec) as parts:
        for part in parts:
            facts = LogFacts.of(part) if facts is None else facts.joined(LogFacts.of(part))
            part_traps = part_traps or list(
                step_traps(part, spec, options.env, env_kwargs, state_of=known_state_of(options.env))
            )  # of the first file
    if facts is None:
        raise DataError(f"{options.path} is empty: there is no episode in it")
    traps = [*log_traps(facts, spec, options.env, env_kwargs, columns), *part_traps]
    num_steps = int(facts.lengths.sum())
    if num_steps > 1 and (constant := constant_columns(facts.ranges, columns)):
        print(f"note: the same at every step: {', '.join(constant)}")
    if spec is None and facts.varies and facts.are_choices and not facts.are_one_hot:
        print(
            "note: all actions are small whole numbers; if they are choices (discrete actions), dt_ray can't learn them"
        )
    if traps:
        raise DataError("\n  ".join([f"{options.path} can be trained on, but looks wrong:", *traps]))
    against = f"fits {options.env}" if options.env else "pass --env to check it against an environment"
    print(f"{options.path} is sound: {len(facts.lengths)} episodes, {num_steps} steps; {against}")

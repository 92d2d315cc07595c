"""Makes, imports, describes and checks datasets.

python -m dt_ray.data collect --behavior mixed --episodes 600 --out data/pendulum-mixed
python -m dt_ray.data collect --env MyEnv-v0 --behavior my_module:act --out data/mine
python -m dt_ray.data import rows.parquet --out data/mine --column observation=obs --column action=act
python -m dt_ray.data describe data/pendulum-mixed --plot returns.png
python -m dt_ray.data validate data/pendulum-mixed --env Pendulum-v1
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dt_ray.command import run_command, show_log

if TYPE_CHECKING:
    from dt_ray.config import DataConfig
    from dt_ray.data.transitions import TransitionDataset


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
    collect.add_argument("--target-return", type=float, metavar="R", help="what to ask of a checkpoint")
    collect.add_argument("--workers", type=int, metavar="N", help="0: in this process, without Ray")
    collect.add_argument("--out", required=True, metavar="DIR")
    collect.add_argument("--overwrite", action="store_true", help="replace the folder")
    collect.add_argument("--flat", action="store_true", help="write a row per step instead of a row per episode")
    collect.add_argument("--verbose", action="store_true", help="show Ray's own messages too")
    collect.set_defaults(run=collect_episodes)

    for name, run, text in (
        ("import", import_dataset, "pack flat transitions into a dataset of episodes"),
        ("describe", describe, "print what a dataset holds"),
        ("validate", validate, "look for faults"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("path", metavar="SOURCE" if name == "import" else "DATASET")
        command.add_argument(
            "--column", action="append", default=[], metavar="OURS=THEIRS", help="name of a column in flat files"
        )
        command.add_argument(
            "--action-scale", type=float, default=1.0, metavar="X", help="environment action = logged action * X"
        )
        command.set_defaults(run=run)
        if name == "import":
            command.add_argument("--out", required=True, metavar="DIR")
            command.add_argument("--overwrite", action="store_true", help="replace the folder")
        if name == "describe":
            command.add_argument("--plot", metavar="FILE", help="draw the histogram of returns (PNG, SVG or PDF)")
        if name == "validate":
            command.add_argument(
                "--env", metavar="ID", help="also check dimensions and action bounds against this environment"
            )
    return parser


def collect_episodes(options: argparse.Namespace) -> None:
    from dt_ray.collection import CollectionPlan, collect_here, flatten, write_dataset

    plan = CollectionPlan(
        env_id=options.env,
        behavior=options.behavior,
        num_episodes=options.episodes,
        seed=options.seed,
        max_timesteps=options.max_timesteps,
        target_return=options.target_return,
    )
    plan.check()
    shape = flatten if options.flat else lambda table: table
    if options.workers == 0:
        write_dataset(options.out, map(shape, collect_here(plan)), overwrite=options.overwrite)
    else:
        from dt_ray.distributed.cluster import connection
        from dt_ray.distributed.collect import collect_on_ray

        with connection(verbose=options.verbose):
            tables = collect_on_ray(plan, num_workers=options.workers)
            write_dataset(options.out, map(shape, tables), overwrite=options.overwrite)
    print(f"wrote {options.out}")


def import_dataset(options: argparse.Namespace) -> None:
    from dt_ray.collection import write_dataset
    from dt_ray.data.episodes import to_table

    data = _read(options)
    write_dataset(options.out, [to_table(data)], overwrite=options.overwrite)
    print(f"wrote {data.num_episodes} episodes of {data.num_transitions} steps to {options.out}")


def describe(options: argparse.Namespace) -> None:
    import numpy as np
    from rich.console import Console
    from rich.table import Table

    data = _read(options)
    returns, last = data.episode_returns, data.ends - 1
    table = Table(title=options.path, show_header=False)
    rows = {
        "episodes": f"{data.num_episodes}",
        "steps": f"{data.num_transitions}",
        "steps an episode": f"{data.lengths.min()} .. {data.lengths.max()}, mean {data.lengths.mean():.1f}",
        "ended by": f"environment {data.terminated[last].sum()}, time limit or end of log {data.truncated[last].sum()}",
        "return": f"{returns.mean():.2f} ± {returns.std():.2f}",
        "return quantiles": "  ".join(
            f"{share:.0%} {value:.1f}"
            for share in (0, 0.1, 0.25, 0.5, 0.75, 0.9, 1)
            for value in [np.quantile(returns, share)]
        ),
        "reward range": f"{data.rewards.min():.4g} .. {data.rewards.max():.4g}",
    }
    for name in ("observations", "actions"):
        values = getattr(data, name)
        rows[f"{name}, {values.shape[1]} dim"] = ", ".join(
            f"{low:.4g} .. {high:.4g}" for low, high in zip(values.min(axis=0), values.max(axis=0), strict=True)
        )
    for row in rows.items():
        table.add_row(*row)
    console = Console()
    console.print(table)
    counts, edges = np.histogram(returns, bins=12)
    for count, low, high in zip(counts, edges, edges[1:], strict=False):
        console.print(
            f"{low:>12.1f} .. {high:>10.1f}  {'█' * round(40 * count / counts.max())} {count}", highlight=False
        )
    if options.plot:
        from dt_ray.plots import draw_returns

        draw_returns(returns, f"{options.path}: {data.num_episodes} episodes", options.plot)


def validate(options: argparse.Namespace) -> None:
    from dt_ray.data.reading import read_dataset
    from dt_ray.data.spaces import read_spaces

    data = read_dataset(_config(options), read_spaces(options.env) if options.env else None)
    against = f"fits {options.env}" if options.env else "pass --env to check it against an environment"
    print(f"{options.path} is sound: {data.num_episodes} episodes, {data.num_transitions} steps; {against}")


def _read(options: argparse.Namespace) -> TransitionDataset:
    from dt_ray.data.reading import read_dataset

    return read_dataset(_config(options))


def _config(options: argparse.Namespace) -> DataConfig:
    from dt_ray.config import DataConfig
    from dt_ray.errors import UserError

    columns = {}
    for pair in options.column:
        ours, equals, theirs = pair.partition("=")
        if not equals:
            raise UserError(f"--column takes OURS=THEIRS, got {pair!r}")
        columns[ours] = theirs
    return DataConfig(path=options.path, columns=columns, action_scale=options.action_scale)


if __name__ == "__main__":
    run_command(main)

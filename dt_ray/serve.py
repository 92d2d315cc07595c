"""Serves a policy over HTTP, with Ray Serve (extra `serve`); on this machine only unless --host says otherwise.

    python -m dt_ray.serve runs/mine
    curl -X POST localhost:8000/sessions -d '{"observation": [1, 0, 0], "target_return": -200}' -H 'content-type: application/json'
    curl -X POST localhost:8000/sessions/NAME/step -d '{"observation": [1, 0, 0], "reward": -0.1}' -H 'content-type: application/json'
    curl -X DELETE localhost:8000/sessions/NAME

A session is an episode: it starts with an observation and a target return, and each step answers with an action.
Without a target return it asks for the one that the estimates from the log recommend.
"""  # noqa: E501

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

from dt_ray.cli.command import add_modules_argument, run_command, show_log
from dt_ray.training.interrupts import raise_on_sigterm

TOKEN = "DT_RAY_SERVE_TOKEN"  # an environment variable, which other users of the machine can't see


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m dt_ray.serve", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "checkpoint", metavar="RUN|CHECKPOINT", help="a run's folder (its newest checkpoint) or a checkpoint's"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="(default 8000)")
    parser.add_argument("--max-sessions", type=int, default=1000, metavar="N", help="live at a time (default 1000)")
    parser.add_argument("--idle-s", type=float, default=600.0, metavar="S", help="after which one is dropped (600)")
    parser.add_argument(
        "--token",
        metavar="TOKEN",
        help=f"wanted of every request, as Authorization: Bearer TOKEN (default: ${TOKEN} if set, else none)",
    )
    parser.add_argument(
        "--clip",
        action="store_true",
        help="give sessions the nearest return that the log supports where theirs lies outside (default: warn)",
    )
    parser.add_argument("--verbose", action="store_true", help="show Ray's own messages too")
    add_modules_argument(parser)
    return parser


def main(arguments: Sequence[str]) -> None:
    options = make_parser().parse_args(arguments)

    import importlib.util

    from dt_ray.errors import UserError
    from dt_ray.learners.base import as_window_policy
    from dt_ray.runs.checkpoint import load_policy
    from dt_ray.runs.folder import checkpoint_at
    from dt_ray.runs.recommendations import needed_estimates
    from dt_ray.runs.storage import Folder

    show_log()
    if importlib.util.find_spec("fastapi") is None or importlib.util.find_spec("grpc_reflection") is None:
        raise UserError('serving needs the extra serve: pip install "dt-ray[serve]"')
    place = checkpoint_at(Folder.at(options.checkpoint))
    as_window_policy(load_policy(place)[0])  # before anything starts
    if options.clip:
        needed_estimates(place, "--clip")
    from dt_ray.distributed.cluster import connection
    from dt_ray.distributed.serving import serve_policy

    with connection(verbose=options.verbose):
        raise_on_sigterm()  # Ray has its own way
        serve_policy(
            str(place),
            host=options.host,
            port=options.port,
            max_sessions=options.max_sessions,
            idle_s=options.idle_s,
            clip=options.clip,
            token=options.token or os.environ.get(TOKEN) or None,
        )


if __name__ == "__main__":
    run_command(main)

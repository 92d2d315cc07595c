"""Plays evaluation episodes with a trained policy and reports the return reached for each return asked for.

    python -m dt_ray.evaluate runs/mine
    python -m dt_ray.evaluate runs/mine/checkpoints/step-00002000 --target-return -130 -300 --episodes 20
    python -m dt_ray.evaluate runs/mine --json evaluation.json --plot obedience.png --video episodes.gif

Episode i resets its environment with seed + i: the same episodes on every machine, with any number of actors.
A run without an environment (env_id=null) is evaluated on the held-out episodes of its log.

    python -m dt_ray.evaluate runs/mine --offline             what it will reach, estimated from its log alone
    python -m dt_ray.evaluate runs/mine --offline other.parquet --target-return -200 max

An estimate is made in a world model of the log, NAME-world beside the run, which is trained where it isn't there.
It says for each target return what will be reached, with an interval, whether the log backs it, and when not to
believe it.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from dt_ray.cli.command import (
    add_modules_argument,
    print_evaluation,
    print_offline,
    run_command,
    show_log,
    target_return,
)
from dt_ray.config.targets import AUTO

if TYPE_CHECKING:
    from dt_ray.config.schema import EvaluationConfig
    from dt_ray.learners import Policy
    from dt_ray.runs.checkpoint import PolicyFacts
    from dt_ray.runs.evaluation_report import EvaluationReport
    from dt_ray.runs.storage import Folder

# options that only a played episode has a use for
NEED_ENVIRONMENT = ("target_return", "episodes", "seed", "max_timesteps", "max_envs", "actors", "plot", "video", "clip")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m dt_ray.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "checkpoint", metavar="RUN|CHECKPOINT", help="a run's folder (its newest checkpoint) or a checkpoint's"
    )
    parser.add_argument(
        "--target-return",
        metavar="R",
        nargs="+",
        type=target_return,
        help="returns to ask for, max, or auto: what --offline recommended (default: as in training)",
    )
    parser.add_argument(
        "--clip",
        action="store_true",
        help="ask for the nearest return that the log supports where a target return lies outside (default: warn)",
    )
    parser.add_argument("--episodes", metavar="N", type=int, help="episodes for each target return")
    parser.add_argument("--seed", metavar="S", type=int, help="seed of the first episode")
    parser.add_argument("--context-length", metavar="K", type=int, help="steps that the policy sees, up to the model's")
    parser.add_argument("--max-timesteps", metavar="T", type=int, help="cut episodes after so many steps")
    parser.add_argument("--max-envs", metavar="N", type=int, help="environments open at once, over all actors")
    parser.add_argument(
        "--actors", metavar="N", type=int, default=0, help="Ray actors to play on (default 0: this process)"
    )
    parser.add_argument(
        "--offline",
        metavar="LOG",
        nargs="?",
        const="",
        help="estimate from a log alone what will be reached (default: the log it was trained on)",
    )
    parser.add_argument("--json", metavar="FILE", help="write the report, every episode's return included")
    parser.add_argument(
        "--plot", metavar="FILE", help="draw the returns reached against those asked for (PNG, SVG or PDF)"
    )
    parser.add_argument("--video", metavar="FILE", help="record one episode for each target return (GIF)")
    parser.add_argument("--verbose", action="store_true", help="show Ray's own messages too")
    add_modules_argument(parser)
    return parser


def main(arguments: Sequence[str]) -> None:
    options = make_parser().parse_args(arguments)

    from dt_ray.config.loading import change_evaluation
    from dt_ray.data.spaces import misfit_of, needed_environment, read_spaces
    from dt_ray.errors import UserError
    from dt_ray.runs.checkpoint import load_policy, read_facts
    from dt_ray.runs.folder import checkpoint_at
    from dt_ray.runs.recommendations import check_targets, recommended_target
    from dt_ray.runs.storage import Folder

    show_log()
    place = checkpoint_at(Folder.at(options.checkpoint))
    facts = read_facts(place)
    asked = [recommended_target(place) if each == AUTO else each for each in options.target_return or ()]
    evaluation = change_evaluation(
        facts.evaluation,
        facts.model,
        target_returns=tuple(asked) if asked else None,
        num_episodes=options.episodes,
        seed=options.seed,
        context_length=options.context_length,
        max_timesteps=options.max_timesteps,
        max_envs=options.max_envs,
    )
    if options.offline is not None:
        estimate_offline(options, place, evaluation)
        return
    played = [name for name in NEED_ENVIRONMENT if getattr(options, name)]
    if facts.env_id is None and not played:
        report = replay_held_out(place, evaluation)
        print_evaluation(report)
        if options.json:
            Folder.at(options.json).write_text(report.to_json())
        return
    env_id = needed_environment(facts.env_id, ", ".join(f"--{name.replace('_', '-')}" for name in played))
    here = read_spaces(env_id, facts.env_kwargs)
    if (misfit := misfit_of(facts.spec, facts.action_bounds, here)) is not None:
        raise UserError(f"{env_id} has other spaces here, {here}: {misfit}")
    if options.plot and not any(map(math.isfinite, evaluation.target_returns)):
        raise UserError("--plot draws returns against those asked for; give a --target-return that is a number")
    checked = check_targets(evaluation.target_returns, place, clip=options.clip)
    evaluation = replace(evaluation, target_returns=tuple(each.used for each in checked))
    policy, facts = load_policy(place, evaluation)
    report = play_evaluation(policy, facts, evaluation, actors=options.actors, verbose=options.verbose)
    report = report.clipped_from([each.asked for each in checked])
    print_evaluation(report)
    if options.json:
        Folder.at(options.json).write_text(report.to_json())
    if options.plot:
        from dt_ray.reports.figures import draw_obedience, save_figure
        from dt_ray.reports.records import returns_by_target

        title = f"{report.env_id}: {report.num_episodes} episodes a target, after {report.step} updates"
        results = {"mean reached, 95% interval": returns_by_target([report])}
        save_figure(draw_obedience(results, title=title), options.plot)
    if options.video:
        from dt_ray.reports.animations import record_episodes

        record_episodes(policy, env_id, evaluation, options.video, env_kwargs=facts.env_kwargs)


def estimate_offline(options: argparse.Namespace, place: Folder, evaluation: EvaluationConfig) -> None:
    """Prints and writes the estimates from the log alone."""
    from dt_ray.cli.progress import progress
    from dt_ray.errors import UserError
    from dt_ray.jobs.offline import estimate_run
    from dt_ray.runs.storage import Folder

    unused = [f"--{name}" for name in ("video", "actors", "max_envs", "clip") if getattr(options, name)]
    if unused:
        raise UserError(f"{', '.join(unused)}: no episode is played with --offline; leave it out")
    report = estimate_run(
        place, evaluation=evaluation, log_path=options.offline or None, watch=progress, verbose=options.verbose
    )
    print_offline(report)
    if options.json:
        Folder.at(options.json).write_text(report.to_json())
    if options.plot:
        from dt_ray.reports.figures import save_figure
        from dt_ray.reports.offline import draw_estimates

        save_figure(draw_estimates({"estimated": report}), options.plot)


def replay_held_out(checkpoint: Folder, evaluation: EvaluationConfig) -> EvaluationReport:
    """The report on the held-out episodes of the log that a checkpoint was trained on."""
    from dt_ray.jobs.training import read_held_out
    from dt_ray.play.held_out import evaluate_held_out
    from dt_ray.runs.checkpoint import load_learner, load_policy

    policy, facts = load_policy(checkpoint, evaluation)
    held_out = read_held_out(load_learner(checkpoint)[1])
    return evaluate_held_out(policy, held_out, evaluation, step=facts.step)


def play_evaluation(
    policy: Policy, facts: PolicyFacts, evaluation: EvaluationConfig, *, actors: int, verbose: bool
) -> EvaluationReport:
    """The report on all episodes, played in this process or on so many Ray actors."""
    assert facts.env_id is not None, "which the caller has looked at"
    if actors == 0:
        import torch

        from dt_ray.play.evaluation import evaluate

        torch.set_num_threads(1)  # small batches: a second thread slows them
        return evaluate(policy, facts.env_id, evaluation, step=facts.step, env_kwargs=facts.env_kwargs)

    from dt_ray.distributed.cluster import connection
    from dt_ray.distributed.evaluation import EvaluationActors, check_actors

    with connection(verbose=verbose):
        check_actors(actors)
        started = EvaluationActors(
            EvaluationActors.start(min(actors, evaluation.max_envs)), facts.env_id, evaluation, facts.env_kwargs
        )
        return started.submit(policy, step=facts.step).result()


if __name__ == "__main__":
    run_command(main)

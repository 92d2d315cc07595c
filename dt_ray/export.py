"""Writes a policy as one file that acts without dt_ray, and checks it against the policy over whole episodes.

    python -m dt_ray.export runs/mine --format onnx --out policy.onnx      for onnxruntime
    python -m dt_ray.export runs/mine --format torch --out policy.pt2      for torch.export.load

Observations, actions and returns are in the environment's units: what training fitted is inside the file.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence

from dt_ray.cli.command import add_modules_argument, run_command, show_log


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m dt_ray.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "checkpoint", metavar="RUN|CHECKPOINT", help="a run's folder (its newest checkpoint) or a checkpoint's"
    )
    parser.add_argument("--format", choices=("onnx", "torch"), default="onnx", help="(default onnx)")
    parser.add_argument("--out", metavar="FILE", help="(default: policy.onnx or policy.pt2 here)")
    parser.add_argument("--overwrite", action="store_true", help="replace the file")
    add_modules_argument(parser)
    return parser


def main(arguments: Sequence[str]) -> None:
    options = make_parser().parse_args(arguments)

    from dt_ray.config.targets import show_target
    from dt_ray.errors import UserError
    from dt_ray.interchange.exporting import TOLERANCE, export_policy, largest_difference, load_exported
    from dt_ray.runs.checkpoint import load_policy
    from dt_ray.runs.folder import checkpoint_at
    from dt_ray.runs.recommendations import estimates_beside
    from dt_ray.runs.storage import Folder

    show_log()
    out = Folder.at(options.out or {"onnx": "policy.onnx", "torch": "policy.pt2"}[options.format])
    if out.exists() and not options.overwrite:
        raise UserError(f"{out} exists already; give another --out, or replace it with --overwrite")
    place = checkpoint_at(Folder.at(options.checkpoint))
    policy, facts = load_policy(place)
    about = {"env_id": facts.env_id or "", "algorithm": facts.algorithm, "step": facts.step}
    if (estimates := estimates_beside(place)) is not None:
        about["supported_target_returns"] = "{:g}, {:g}".format(*estimates.supported)
        if estimates.best_target is not None:
            about["recommended_target_return"] = show_target(estimates.best_target)
    content = export_policy(policy, options.format, about)
    act = load_exported(content, options.format)
    evaluation = facts.evaluation
    differences = [
        largest_difference(
            act,
            policy,
            facts.env_id,
            target_return=target,
            seed=evaluation.seed,
            max_timesteps=evaluation.max_timesteps,
            env_kwargs=facts.env_kwargs,
        )
        for target in [each for each in evaluation.target_returns if math.isfinite(each)] or [0.0]
    ]
    if max(differences) > TOLERANCE and ":" in facts.algorithm:
        raise UserError(
            f"the policy of {facts.algorithm} does not act by its model's predict_last_action: over whole episodes "
            f"they differ by {max(differences):.1e} of the action bounds"
        )
    if max(differences) > TOLERANCE:
        raise RuntimeError(f"the exported policy differs by {max(differences):.1e} of the action bounds: a bug of ours")
    out.write_bytes(content)
    print(f"wrote {out}, {len(content) / 1024:.0f} kB")
    print(
        f"over {len(differences)} episodes it acts as the checkpoint does, within {max(differences):.0e} of the bounds"
    )


if __name__ == "__main__":
    run_command(main)

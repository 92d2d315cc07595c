"""Draws the results of runs and sweeps: one page, with its pictures as PNG and its tables as CSV.

python -m dt_ray.report runs/mine                      into runs/mine/report/
python -m dt_ray.report runs/one runs/two --out both   side by side; runs that differ in their seed only as one
python -m dt_ray.report sweeps/mine --video            with an animation for each target return
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from dt_ray.cli.command import add_modules_argument, run_command, show_log


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m dt_ray.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("places", metavar="RUN_OR_SWEEP", nargs="+", help="folders of runs or sweeps")
    parser.add_argument("--out", metavar="DIR", help="folder for the report (default: report/ in the run or sweep)")
    parser.add_argument("--video", action="store_true", help="record an episode for each target return (GIF)")
    add_modules_argument(parser)
    return parser


def main(arguments: Sequence[str]) -> None:
    parser = make_parser()
    options = parser.parse_args(arguments)

    from dt_ray.reports.page import write_report
    from dt_ray.runs.storage import Folder

    show_log()
    if options.out is None and len(options.places) > 1:
        parser.error("several runs need --out DIR")
    out = Folder.at(options.out) if options.out else Folder.at(options.places[0]) / "report"
    files = write_report(options.places, out, video=options.video)
    for file in files:
        print(f"{out}/{file}")


if __name__ == "__main__":
    run_command(main)

"""A campaign of faults: real runs that lose processes, nodes and storage at random moments, and what they come to.

    python benchmarks/faults.py                      every kind of fault, some times each, as in docs/reliability.md
    python benchmarks/faults.py --kind node --runs 2
    python benchmarks/faults.py --out docs/reliability.md

Each run is the command that a user types, on a Ray cluster of its own. It must finish by itself, or by its resume
command where its driver is gone; its last weights, losses and evaluations are compared with an undisturbed run's.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import rich.box
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # the faults are those of the tests
from support.campaign import Campaign, Outcome
from support.faults import KINDS
from support.object_store import ObjectStore

BEGIN, END = "<!-- faults -->", "<!-- /faults -->"


def table(outcomes: Sequence[Outcome]) -> Table:
    """A row for each kind of fault."""
    columns = ("fault", "runs", "faults", "finished", "updates lost: max", "mean", "largest difference of a parameter")
    result = Table(*columns, "same losses", "same evaluations", "mean seconds")
    for kind, group in itertools.groupby(outcomes, lambda outcome: outcome.kind):
        runs = list(group)
        lost = [number for run in runs for number in run.lost]
        result.add_row(
            KINDS[kind].what,
            f"{len(runs)}",
            f"{len(lost)}",
            f"{sum(run.finished for run in runs)}",
            f"{max(lost, default=0)}",
            f"{np.mean(lost or [0]):.0f}",
            f"{max(run.difference for run in runs):.2g}",
            f"{sum(run.same_losses for run in runs)}",
            f"{sum(run.same_evaluations for run in runs)}",
            f"{np.mean([run.wall_s for run in runs]):.0f}",
        )
    lost = [number for run in outcomes for number in run.lost]
    finished = sum(run.finished for run in outcomes)
    result.add_row(
        "all", f"{len(outcomes)}", f"{len(lost)}", f"{finished}", f"{max(lost)}", f"{np.mean(lost):.0f}", "", "", "", ""
    )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", action="append", choices=KINDS, help="only this kind; may be repeated")
    parser.add_argument("--runs", type=int, help="so many of each kind")
    parser.add_argument("--seed", type=int, default=0, help="of the moments at which faults strike")
    parser.add_argument("--folder", type=Path, help="where runs and logs are left (default: a temporary folder)")
    parser.add_argument("--out", type=Path, help="the page whose table is replaced")
    options = parser.parse_args()
    store = ObjectStore()
    os.environ.update(store.environment)
    folder = options.folder or Path(tempfile.mkdtemp(prefix="faults-"))
    campaign = Campaign(folder, options.seed, store, ends_within_s=30)
    outcomes = []
    for kind in options.kind or KINDS:
        for number in range(options.runs or KINDS[kind].times):
            outcomes.append(campaign.run(kind, number))
            print(outcomes[-1], file=sys.stderr)
    result = table(outcomes)
    result.box = rich.box.MARKDOWN
    console = Console(width=220, record=True)
    console.print(result)
    if options.out:
        page = options.out.read_text()
        before, after = page.split(BEGIN)[0], page.split(END)[1]
        rows = "\n".join(line.rstrip() for line in console.export_text().splitlines() if line.strip())
        options.out.write_text(f"{before}{BEGIN}\n{rows}\n{END}{after}")
    sys.exit(any(not outcome.finished for outcome in outcomes))


if __name__ == "__main__":
    main()

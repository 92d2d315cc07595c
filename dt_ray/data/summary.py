"""A short summary of a dataset, for `describe` and for the card beside a dataset."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy import ndarray

from dt_ray.data.transitions import TransitionDataset

NUM_BINS = 12
BAR = 40  # characters of the longest bar
QUANTILES = (0, 0.1, 0.25, 0.5, 0.75, 0.9, 1)


@dataclass
class DatasetSummary:
    """Counts, returns and ranges, gathered part by part."""

    returns: list[ndarray] = field(default_factory=list[ndarray])
    lengths: list[ndarray] = field(default_factory=list[ndarray])
    num_terminated: int = 0
    ranges: dict[str, ndarray] = field(default_factory=dict[str, ndarray])  # by column, [lowest and highest, dimension]

    def add(self, data: TransitionDataset) -> None:
        """Counts these episodes too."""
        self.returns.append(data.episode_returns)
        self.lengths.append(data.lengths)
        self.num_terminated += int(data.terminated[data.ends - 1].sum())
        for name in ("observations", "actions", "rewards"):
            values = getattr(data, name).reshape(data.num_transitions, -1)
            found = np.stack([values.min(axis=0), values.max(axis=0)])
            known = self.ranges.get(name, found)
            self.ranges[name] = np.stack([np.minimum(known[0], found[0]), np.maximum(known[1], found[1])])

    def rows(self) -> dict[str, str]:
        """The facts in words, by name."""
        returns, lengths = np.concatenate(self.returns), np.concatenate(self.lengths)
        (lowest,), (highest,) = self.ranges["rewards"]
        rows = {
            "episodes": f"{len(returns)}",
            "steps": f"{lengths.sum()}",
            "steps an episode": f"{lengths.min()} .. {lengths.max()}, mean {lengths.mean():.1f}",
            "ended by": (
                f"environment {self.num_terminated}, time limit or end of log {len(returns) - self.num_terminated}"
            ),
            "return": f"{returns.mean():.2f} ± {returns.std():.2f}",
            "return quantiles": "  ".join(f"{share:.0%} {np.quantile(returns, share):.1f}" for share in QUANTILES),
            "reward range": f"{lowest:.4g} .. {highest:.4g}",
        }
        for name in ("observations", "actions"):
            low, high = self.ranges[name]
            bounds = ", ".join(f"{one:.4g} .. {other:.4g}" for one, other in zip(low, high, strict=True))
            rows[f"{name}, {len(low)} dim"] = bounds
        return rows

    def histogram(self) -> list[str]:
        """Returns of episodes, a line for each bin."""
        counts, edges = np.histogram(np.concatenate(self.returns), bins=NUM_BINS)
        return [
            f"{low:>12.1f} .. {high:>10.1f}  {'█' * round(BAR * count / counts.max())} {count}"
            for count, low, high in zip(counts, edges, edges[1:], strict=False)
        ]

    def card(self, title: str, *, source: str, licence: str | None) -> str:
        """A page about the dataset, in Markdown."""
        facts = {"source": source, "licence": licence or "not stated", **self.rows()}
        table = "\n".join(f"| {name} | {value.replace('|', '/')} |" for name, value in facts.items())
        histogram = "\n".join(self.histogram())
        return f"# {title}\n\n| | |\n|---|---|\n{table}\n\nReturns of its episodes:\n\n```\n{histogram}\n```\n"

"""Ranks the episodes that are unlike the others of a log, with reasons.

An episode is judged by many signals (`signals.py`), each a number that is about the same in most episodes.
It is an outlier if a signal lies `THRESHOLD` robust standard deviations from that signal's median.

Legend: E episodes, D columns or dimensions of one signal.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy import ndarray

FEWEST_EPISODES = 10  # fewer are not compared
THRESHOLD = 5.0  # robust standard deviations from the median
GROUP_SHARE = 0.05  # of the episodes: if more are unusual in the same way, they are a group and no outliers
KIND_SHARE = 0.01  # of the episodes: so many outliers of each kind are listed at most, but `FEWEST_LISTED` always
FEWEST_LISTED = 3  # so few are never a group
CERTAIN = 2.0  # outliers beyond so many thresholds are always listed
DEVIATION = 1.4826  # standard deviation of a normal distribution over its median absolute deviation
NORMAL_TENTH = 1.2816  # a tenth of a normal distribution lies beyond so many standard deviations
MAX_REASONS = 2


@dataclass(frozen=True, kw_only=True)
class Signal:
    """A number by which each episode is compared with the others."""

    kind: str
    values: Float[ndarray, "E D"]  # NaN where the episode is not judged by it
    floor: float | Float[ndarray, "D"]  # the smallest value that one deviation may have
    say: Callable[[int, int], str]  # (episode, column) -> a sentence about what is unusual
    also: Float[ndarray, "E D"] | None = None  # must be unusual too, beyond half of the threshold
    sign: int = 0  # +1: only large values are unusual, -1: only small ones, 0: both
    isolated: bool = False  # only values far from those of all others are unusual
    step: Callable[[int, int], int] | None = None  # (episode, column) -> the step where it begins

    def scores(self) -> Float[ndarray, "E D"]:
        """The sizes of the deviations; 0 where a group of episodes deviates in the same way."""
        scores = self._sizes(self.values)
        if self.also is not None:
            scores = np.where(self._sizes(self.also) > THRESHOLD / 2, scores, 0.0)
        is_group = (scores > THRESHOLD).sum(axis=0) > max(FEWEST_LISTED, GROUP_SHARE * len(scores))
        return np.where(is_group, 0.0, scores)

    def _sizes(self, values: Float[ndarray, "E D"]) -> Float[ndarray, "E D"]:
        scores = robust_scores(values, floor=self.floor, isolated=self.isolated)
        return np.abs(scores) if self.sign == 0 else np.maximum(self.sign * scores, 0.0)


@dataclass(frozen=True, kw_only=True)
class Outlier:
    """An episode that is unlike the others, by its place in the order of ids."""

    episode: int
    score: float  # of its most unusual signal, in robust standard deviations
    kinds: tuple[str, ...]
    step: int | None  # where it begins, where that is known
    reasons: tuple[str, ...]


def rank_outliers(signals: Sequence[Signal]) -> list[Outlier]:
    """The outliers, the most unusual ones first.

    Signals stand in the order in which they explain an episode: a sensor that is stuck also breaks the dynamics, and is
    then said to be stuck. Scores above `CERTAIN` thresholds are always listed. Of the others at most `KIND_SHARE` of
    the episodes are, for each kind: what many episodes have is no fault of one.
    """
    scores = [signal.scores() for signal in signals]
    best = np.max([each.max(axis=1) for each in scores], axis=0)
    order = [int(each) for each in np.argsort(-best, kind="stable") if best[each] > THRESHOLD]
    most = max(FEWEST_LISTED, int(KIND_SHARE * len(best)))
    listed: list[Outlier] = []
    num_of_kind: Counter[str] = Counter()
    for episode in order:
        outlier = _explain(episode, float(best[episode]), signals, scores)
        num_of_kind[outlier.kinds[0]] += 1
        if num_of_kind[outlier.kinds[0]] <= most or outlier.score > CERTAIN * THRESHOLD:
            listed.append(outlier)
    return listed


def _explain(episode: int, score: float, signals: Sequence[Signal], scores: Sequence[ndarray]) -> Outlier:
    reasons: dict[str, str] = {}
    step = None
    for signal, found in zip(signals, scores, strict=True):
        column = int(found[episode].argmax())
        if found[episode, column] <= THRESHOLD or signal.kind in reasons:
            continue
        reasons[signal.kind] = signal.say(episode, column) if len(reasons) < MAX_REASONS else ""
        if step is None and signal.step is not None:
            step = signal.step(episode, column)
    said = tuple(filter(None, reasons.values()))
    return Outlier(episode=episode, score=score, kinds=tuple(reasons), step=step, reasons=said)


def robust_scores(
    values: Float[ndarray, "E D"], *, floor: float | Float[ndarray, "D"], isolated: bool = False
) -> Float[ndarray, "E D"]:
    """How many robust standard deviations each value lies above (+) or below (-) the median of its column; NaN gives 0.

    The deviation is that of the value's own side: the largest of 1.4826 times the median distance of the values there
    (a double median absolute deviation, Rosenmai 2013; Iglewicz and Hoaglin 1993 for scores by the median), of the
    distance that a tenth of all episodes is beyond over 1.2816 (as of a normal distribution), and `floor`. With
    `isolated` also half of the distance that a twentieth is beyond: what is found then lies 2.5 times as far out as
    those, and no group of good or bad episodes is.
    """
    known = np.isfinite(values).sum(axis=0) >= FEWEST_EPISODES
    scores = np.zeros(values.shape)
    values = values[:, known]
    floor = np.broadcast_to(floor, scores.shape[1:])[known]
    away = np.nan_to_num(values - np.nanmedian(values, axis=0))
    for sign in (1.0, -1.0):
        side = np.where(away * sign >= 0, away * sign, np.nan)
        scale = np.maximum(DEVIATION * np.nanmedian(side, axis=0), floor)
        scale = np.maximum(scale, np.quantile(away * sign, 0.9, axis=0) / NORMAL_TENTH)
        if isolated:
            scale = np.maximum(scale, np.quantile(away * sign, 0.95, axis=0) / 2)
        scores[:, known] += sign * np.nan_to_num(side) / scale
    return scores

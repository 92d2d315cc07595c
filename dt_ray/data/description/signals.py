"""The signals by which the episodes of a log are compared, each with a sentence about an unusual episode.

Legend: E episodes, K sampled steps, C columns (observations, actions, reward), D columns of one signal.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from dt_ray.data.description.episode_features import EpisodeFeatures
from dt_ray.data.description.outliers import DEVIATION, FEWEST_EPISODES, THRESHOLD, Outlier, Signal, rank_outliers
from dt_ray.data.description.step_models import (
    FEWEST_STEPS,
    StepModel,
    dynamics_of,
    fit_model,
    guess_mistake,
    over_steps,
    rewards_of,
)

EXACT = 0.01  # of the spread of what is predicted: smaller errors of a model count as none
NO_EFFECT = 0.35  # of the usual effect of actions: less counts as no effect
FEW = 0.1  # share of the episodes
MOVES_APART = 0.3  # of the usual largest move: spikes and jumps that are smaller are none
MAX_MODELLED = 60_000  # sampled steps that models predict; of more, every second one is taken


def find_outliers(features: EpisodeFeatures, names: Sequence[str]) -> list[Outlier]:
    """The outliers among the episodes, ranked; none where there are few episodes. `names` are the columns' names."""
    if features.num_episodes < FEWEST_EPISODES:
        return []
    while features.rows.shape[1] > 8 and features.rows.shape[0] * features.rows.shape[1] > MAX_MODELLED:
        features = features.thinned()
    size = column_spreads(features)
    signals = [
        *_repeat_signals(features),
        *_movement_signals(features, names, size),
        *_cut_signals(features),
        *_action_signals(features, names),
        *_dynamics_signals(features, names),
        *_reward_signals(features),
        *_level_signals(features, names, size),
    ]
    return rank_outliers(signals)


def column_spreads(features: EpisodeFeatures) -> Float[ndarray, "C"]:
    """The robust spread of each column; 1 for a constant column.

    1.4826 times the median distance of the sampled steps from their median, or, where that is more, the median of the
    standard deviations within episodes.
    """
    rows = features.rows[np.isfinite(features.rows).all(axis=2)].astype(np.float64)
    spread = np.median(features.spread, axis=0)
    if len(rows):
        spread = np.maximum(spread, DEVIATION * np.median(np.abs(rows - np.median(rows, axis=0)), axis=0))
    return np.where(spread > 0, spread, np.where(features.spread.max(axis=0) > 0, features.spread.max(axis=0), 1.0))


def _repeat_signals(features: EpisodeFeatures) -> Iterator[Signal]:
    num = features.num_repeats

    yield Signal(
        kind="repeated rows",
        values=np.log(num + 1.0)[:, None],
        floor=0.2,
        sign=1,
        say=lambda e, _: (
            f"{num[e]} of {features.lengths[e]} rows are there twice, the first again at step "
            f"{features.repeat_step[e]}, usually {np.median(num):.0f} are"
        ),
        step=lambda e, _: int(features.repeat_step[e]),
    )


def _movement_signals(features: EpisodeFeatures, names: Sequence[str], size: Float[ndarray, "C"]) -> Iterator[Signal]:
    num = features.observation_dim
    run, scale = features.run[:, :num], size[:num]
    usual_run = np.median(run, axis=0)

    yield Signal(
        kind="stuck sensor",
        values=np.log(run),
        floor=0.25,
        sign=1,
        say=lambda e, c: (
            f"{names[c]} has the same value for {run[e, c]} steps from step {features.run_step[e, c]} on, "
            f"usually for at most {usual_run[c]:.0f}"
        ),
        step=lambda e, c: int(features.run_step[e, c]),
    )
    least = np.maximum(MOVES_APART * np.median(features.jump[:, :num] / scale, axis=0), EXACT)
    for kind, name, step, words in (
        ("spike", "spike", features.spike_step, "moves by {:.4g} at step {} and back at the next one"),
        ("jump", "jump", features.jump_step, "moves by {:.4g} from the step before to step {}"),
        ("jump", "bend", features.bend_step, "changes its course by {:.4g} at step {}"),
    ):
        moves = getattr(features, name)[:, :num]

        def say(
            e: int, c: int, moves: ndarray = moves, step: ndarray = step, words: str = words, kind: str = kind
        ) -> str:
            what = words.format(moves[e, c], step[e, c])
            return f"{names[c]} {what}, the largest of an episode is usually {np.median(moves[:, c]):.4g}"

        own = features.usual_move[:, :num] + np.median(features.usual_move[:, :num], axis=0) / 2 + EXACT * least * scale
        yield Signal(
            kind=kind,
            values=np.log(moves / scale + least),
            also=np.log(moves / own + 1),
            floor=0.15,
            sign=1,
            say=say,
            step=lambda e, c, step=step: int(step[e, c]),
        )


def _cut_signals(features: EpisodeFeatures) -> Iterator[Signal]:
    """Episodes that stop short of where the others do, and that the environment did not end.

    The time limit is the length that most of them have, or the longest. Where few are shorter, those are cut. Else,
    where lengths differ, an episode is cut that is much shorter than nearly all of the others.
    """
    lengths, is_open = features.lengths, ~features.is_terminated
    found, counts = np.unique(lengths[is_open], return_counts=True)
    if not len(found):
        return
    limit = found[counts.argmax()] if counts.max() > len(lengths) * FEW else lengths.max()
    is_short = is_open & (lengths < limit)
    if is_short.mean() <= FEW:
        excess = np.where(is_short, 2 * THRESHOLD - lengths / limit, 0.0)
    else:
        shortest = np.quantile(lengths[is_open], 0.025)
        excess = np.where(is_short, np.maximum(THRESHOLD * np.log(shortest / lengths) / np.log(1.5), 0), 0.0)
    yield Signal(
        kind="cut episode",
        values=excess[:, None],
        floor=1.0,
        sign=1,
        say=lambda e, _: (
            f"it stops after {lengths[e]} steps, and the environment did not end it, the others have "
            f"a median of {np.median(lengths):.0f}"
        ),
        step=lambda e, _: int(lengths[e]) - 1,
    )


def _action_signals(features: EpisodeFeatures, names: Sequence[str]) -> Iterator[Signal]:
    acted = slice(features.observation_dim, features.observation_dim + features.action_dim)
    run, first = features.run[:, acted], features.run_step[:, acted]
    low, high = features.lowest[:, acted].min(axis=0), features.highest[:, acted].max(axis=0)

    yield Signal(
        kind="constant action",
        values=np.log(run),
        floor=0.4,
        sign=1,
        say=lambda e, a: (
            f"{names[acted.start + a]} has the same value for {run[e, a]} steps from step {first[e, a]} on, usually "
            f"for at most {np.median(run[:, a]):.0f}"
        ),
        step=lambda e, a: int(first[e, a]),
    )
    margin = 1e-3 * (high - low)
    is_at = (features.lowest[:, acted] <= low + margin) | (features.highest[:, acted] >= high - margin)
    share = (features.at_limit * is_at).mean(axis=1, keepdims=True)
    share[features.lengths < FEWEST_STEPS] = np.nan
    yield Signal(
        kind="saturated actions",
        values=share,
        floor=0.05,
        sign=1,
        say=lambda e, _: (
            f"{share[e, 0]:.0%} of its actions are at the lowest or highest of the log, usually "
            f"{np.nanmedian(share):.0%}"
        ),
    )


def _level_signals(features: EpisodeFeatures, names: Sequence[str], size: Float[ndarray, "C"]) -> Iterator[Signal]:
    num, total = features.observation_dim, len(size)
    for kind, columns in (
        ("other observations", slice(0, num)),
        ("other actions", slice(num, total - 1)),
        ("other rewards", slice(total - 1, total)),
    ):
        begin = columns.start
        low = np.quantile(features.lowest[:, columns], 0.05, axis=0)
        high = np.quantile(features.highest[:, columns], 0.95, axis=0)

        def say(e: int, c: int, begin: int = begin, low: ndarray = low, high: ndarray = high) -> str:
            at = begin + c
            return (
                f"{names[at]} lies between {features.lowest[e, at]:.4g} and {features.highest[e, at]:.4g}, on average "
                f"{features.mean[e, at]:.4g} ± {features.spread[e, at]:.3g}, in the others between {low[c]:.4g} and "
                f"{high[c]:.4g}, usually {np.median(features.mean[:, at]):.4g} ± "
                f"{np.median(features.spread[:, at]):.3g}: another unit, or another situation"
            )

        level = features.mean[:, columns] / size[columns]
        spread = np.log(features.spread[:, columns] / size[columns] + EXACT)
        yield Signal(kind=kind, values=level, floor=0.1, isolated=True, say=say)
        yield Signal(kind=kind, values=spread, floor=0.15, isolated=True, say=say)


def _dynamics_signals(features: EpisodeFeatures, names: Sequence[str]) -> Iterator[Signal]:
    inputs, changes = dynamics_of(features)
    if (model := fit_model(inputs, changes)) is None:
        return
    errors = model.errors(inputs, changes)

    still = inputs.copy()
    still[:, :, features.observation_dim :] = model.center[features.observation_dim :]
    effect = _slopes(errors, model.predict(inputs) - model.predict(still), model)
    sizes = over_steps(np.abs(errors))
    worst = (np.nan_to_num(sizes) / np.maximum(model.usual, EXACT)).argmax(axis=1)

    def say(e: int, _: int) -> str:
        if guess := guess_mistake(model, inputs[e], changes[e], names):
            return f"its observations do not follow one another as in the other episodes: {guess}"
        if abs(1 + effect[e, 0]) < NO_EFFECT:
            return "its actions seem to have no effect on the next observations"
        return (
            f"{names[worst[e]]} does not change as it does in the other episodes after such observations and actions: "
            f"swapped columns, another unit, or other actions do that"
        )

    floor = np.maximum(0.02, 0.5 * model.usual)
    yield Signal(kind="other dynamics", values=effect, floor=0.05, say=say)
    yield Signal(kind="other dynamics", values=np.log(sizes + EXACT), floor=0.1, sign=1, say=say)
    yield Signal(kind="other dynamics", values=over_steps(errors), floor=floor, say=say)


def _reward_signals(features: EpisodeFeatures) -> Iterator[Signal]:
    inputs, rewards = rewards_of(features)
    if (model := fit_model(inputs, rewards)) is None:
        return
    errors = model.errors(inputs, rewards)
    bias = over_steps(errors)
    slope = _slopes(errors, model.predict(inputs), model)

    def say(e: int, _: int) -> str:
        by, times = float(bias[e, 0] * model.spread[0]), float(1 + slope[e, 0])
        of = f"about {times:.3g} times, " if np.isfinite(times) else ""
        return f"its rewards are not those of the others for such steps: {of}on average {by:+.3g}"

    floor = np.maximum(0.02, 0.5 * model.usual)
    yield Signal(kind="other rewards", values=slope, floor=0.05, say=say)
    yield Signal(kind="other rewards", values=bias, floor=floor, say=say)
    sizes = np.log(over_steps(np.abs(errors)) + EXACT)
    yield Signal(kind="other rewards", values=sizes, floor=0.1, sign=1, say=say)


def _slopes(
    errors: Float[ndarray, "E K D"], effects: Float[ndarray, "E K D"], model: StepModel
) -> Float[ndarray, "E 1"]:
    """How much the effects in each episode differ from the expected ones: 0 as expected, -1 no effect, 1 twice as much.

    The least-squares slope of the errors over the effects, each divided by the usual error of its dimension, and
    clipped, so that no single step decides. NaN where hardly any effect is expected.
    """
    weights = 1 / np.maximum(model.usual, EXACT)
    limit = 20 * np.nanmedian(np.abs(effects), axis=(0, 1)) * weights + 1
    one, other = (np.nan_to_num(np.clip(each * weights, -limit, limit)) for each in (errors, effects))
    power = (other**2).sum(axis=(1, 2))
    slope = (one * other).sum(axis=(1, 2)) / np.maximum(power, 1e-12)
    is_known = (power > 0.05 * np.median(power)) & (np.isfinite(effects).all(axis=2).sum(axis=1) >= FEWEST_STEPS)
    return np.where(is_known, slope, np.nan)[:, None]

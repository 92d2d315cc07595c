"""Faults that make a file useless for training, named by episode and step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from jaxtyping import Bool, Float
from numpy import ndarray

from dt_ray.data.spaces import SpaceSpec
from dt_ray.data.transitions import TransitionDataset

NOT_FINITE, OUT_OF_BOUNDS = "which is not finite", "is outside the environment's bounds"  # faults that a setting mends
MOST_CHOICES = 18  # of an agent: so many has an Atari console's joystick
BOUNDS_TOLERANCE = 1e-4  # of the action range: float32 samples of a squashed policy round past the bound


def faults_in(
    data: TransitionDataset, spec: SpaceSpec | None = None, labels: Mapping[int, str] | None = None
) -> Iterator[str]:
    """One line per fault: NaN or infinite values, and, given `spec`, wrong dimensions and actions out of bounds.

    `labels` are the logged ids of episodes, where they are not those of `data`.
    """
    labels = labels or {}
    for name in ("observations", "actions", "rewards", "returns_to_go"):
        if (logged := getattr(data, name)) is None:
            continue
        values = logged.reshape(data.num_transitions, -1)
        for step in np.flatnonzero(~np.isfinite(values).all(axis=1)):
            yield f"{_place(data, step, labels)}: {name} hold {_show(values[step])}, {NOT_FINITE}"
    if spec is None:
        return
    for name, have, want in (
        ("observations", data.observations.shape[1], spec.observation_dim),
        ("actions", data.actions.shape[1], spec.action_dim),
    ):
        if have != want:
            yield f"{name} have {have} dimension(s) where the environment has {want}"
            return
    low, high = np.asarray(spec.action_low), np.asarray(spec.action_high)
    width = np.where(np.isfinite(low) & np.isfinite(high) & (high > low), high - low, 1.0)
    margin = BOUNDS_TOLERANCE * width
    for step in np.flatnonzero(((data.actions < low - margin) | (data.actions > high + margin)).any(axis=1)):
        place, action = _place(data, step, labels), _show(data.actions[step])
        yield f"{place}: action {action} {OUT_OF_BOUNDS} {_show(low)}..{_show(high)}"


def are_choices(actions: Float[ndarray, "N A"]) -> Bool[ndarray, "N"]:
    """Which actions may be numbers of choices: small whole numbers in every dimension.

    A log without other actions is one of discrete actions, unless valves and switches were logged in whole steps.
    """
    return ((actions == np.round(actions)) & (actions >= 0) & (actions < MOST_CHOICES)).all(axis=1)


def are_one_hot(actions: Float[ndarray, "N A"]) -> Bool[ndarray, "N"]:
    """Which actions are one-hot vectors, the other form of choices: a single 1 among zeros."""
    return ((actions == 0) | (actions == 1)).all(axis=1) & (actions.sum(axis=1) == 1) & (actions.shape[1] > 1)


def _place(data: TransitionDataset, step: np.intp, labels: Mapping[int, str]) -> str:
    episode = int(np.searchsorted(data.starts, step, side="right")) - 1
    number = int(data.episode_ids[episode])
    return f"episode {labels.get(number, f'{number}')}, step {step - data.starts[episode]}"


def _show(values: ndarray) -> str:
    return np.array2string(np.asarray(values, dtype=np.float64), precision=4, separator=", ", threshold=8)

"""Whole episodes in memory.

Legend: N transitions, E episodes, S observation dimension, A action dimension.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, cast

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray

from dt_ray.data.returns import Tail, returns_to_go
from dt_ray.errors import DataError

SOURCE_BITS = 56  # the bits of an episode id above these are the number of its dataset, where several are mixed
STEP_FIELDS = ("observations", "actions", "rewards", "terminated", "truncated")


@dataclass(frozen=True, kw_only=True)
class TransitionDataset:
    """Episodes laid end to end; `starts` marks where each one begins.

    Where `starts` is not given, an episode ends at every `terminated` or `truncated` step and at the last row.
    `terminated` says that the environment ended there; `truncated` that a time limit, or the end of the log, cut it.

    Raises:
        ValueError: columns of different lengths, or `starts` that are not increasing from 0.
    """

    observations: Float[ndarray, "N S"]
    actions: Float[ndarray, "N A"]
    rewards: Float[ndarray, "N"]
    terminated: Bool[ndarray, "N"] = field(default=None)  # type: ignore[assignment]
    truncated: Bool[ndarray, "N"] = field(default=None)  # type: ignore[assignment]
    starts: Int[ndarray, "E"] = field(default=None)  # type: ignore[assignment]
    episode_ids: Int[ndarray, "E"] = field(default=None)  # type: ignore[assignment]
    returns_to_go: Float[ndarray, "N"] | None = None  # as logged; None: they are summed from the rewards
    first_timesteps: Int[ndarray, "E"] | None = None  # where pieces of episodes begin; None: all episodes are whole
    final_observations: Float[ndarray, "E S"] | None = None  # after each last step; NaN where it was not logged

    def __post_init__(self) -> None:
        num = len(self.rewards)
        missing = {name for name in ("starts", "terminated", "truncated", "episode_ids") if getattr(self, name) is None}
        if {"starts", "terminated", "truncated"} <= missing:
            raise ValueError("episodes need boundaries: give starts, or terminated and truncated")
        for name in missing & {"terminated", "truncated"}:
            object.__setattr__(self, name, np.zeros(num, dtype=bool))
        for name in ("observations", "actions", "terminated", "truncated"):
            rows = len(getattr(self, name))
            if rows != num:
                raise ValueError(f"{name} has {rows} rows but rewards has {num}; every column needs one row per step")
        for name in ("observations", "actions"):
            if getattr(self, name).ndim != 2:
                raise ValueError(f"{name} must be [steps, dimension], got shape {getattr(self, name).shape}")
        if "starts" in missing:
            ends = np.flatnonzero(self.terminated | self.truncated) + 1
            object.__setattr__(self, "starts", np.concatenate([[0], ends[ends < num]]).astype(np.int64)[: max(num, 0)])
        elif len(self.starts) and (self.starts[0] != 0 or (np.diff(self.starts) <= 0).any() or self.starts[-1] >= num):
            raise ValueError("starts must increase strictly from 0 and stay below the number of steps")
        if "episode_ids" in missing:
            object.__setattr__(self, "episode_ids", np.arange(len(self.starts)))

    @property
    def num_transitions(self) -> int:
        return len(self.rewards)

    @property
    def num_episodes(self) -> int:
        return len(self.starts)

    @property
    def ends(self) -> Int[ndarray, "E"]:
        """One past the last step of each episode."""
        return np.append(self.starts, self.num_transitions)[1:]

    @property
    def lengths(self) -> Int[ndarray, "E"]:
        return self.ends - self.starts

    @property
    def episode_returns(self) -> Float[ndarray, "E"]:
        """Undiscounted sum of rewards of each episode."""
        if not len(self.starts):
            return np.zeros(0)
        return np.add.reduceat(self.rewards.astype(np.float64), self.starts)

    @property
    def timesteps(self) -> Int[ndarray, "N"]:
        """Steps since the start of the episode."""
        starts = self.starts if self.first_timesteps is None else self.starts - self.first_timesteps
        return np.arange(self.num_transitions) - np.repeat(starts, self.lengths)

    def to_go(self, discount: float = 1.0, tail: Tail | None = None) -> Float[ndarray, "N"]:
        """Returns-to-go: those that were logged, else the rewards'; `tail` as for `returns_to_go`."""
        if self.returns_to_go is not None:
            return self.returns_to_go
        return returns_to_go(self.rewards, self.starts, discount=discount, tail=tail)

    def select(self, episodes: Sequence[int] | Int[ndarray, "M"]) -> TransitionDataset:
        """These episodes, in this order."""
        episodes = np.asarray(episodes, dtype=np.int64)
        lengths = self.lengths[episodes]
        starts = np.cumsum(lengths) - lengths
        rows = cast("ndarray", np.arange(lengths.sum()) + np.repeat(self.starts[episodes] - starts, lengths))
        return TransitionDataset(
            observations=self.observations[rows],
            actions=self.actions[rows],
            rewards=self.rewards[rows],
            terminated=self.terminated[rows],
            truncated=self.truncated[rows],
            starts=starts,
            episode_ids=self.episode_ids[episodes],
            returns_to_go=None if self.returns_to_go is None else self.returns_to_go[rows],
            first_timesteps=None if self.first_timesteps is None else self.first_timesteps[episodes],
            final_observations=None if self.final_observations is None else self.final_observations[episodes],
        )

    def pieces(self, length: int) -> Iterator[TransitionDataset]:
        """Cuts its only episode into pieces of `length` steps, which keep their returns-to-go and timesteps."""
        assert self.num_episodes == 1
        assert self.returns_to_go is not None
        for begin in range(0, self.num_transitions, length):
            rows = slice(begin, begin + length)
            follows = self.observations[rows.stop : rows.stop + 1]  # none behind the last piece
            yield TransitionDataset(
                **{name: getattr(self, name)[rows] for name in (*STEP_FIELDS, "returns_to_go")},
                starts=np.zeros(1, np.int64),
                episode_ids=self.episode_ids,
                first_timesteps=np.array([begin]),
                final_observations=follows if len(follows) else self.final_observations,
            )

    def with_time_limit(self, limit: int | None) -> TransitionDataset:
        """Marks episodes of `limit` steps as truncated, whatever the log says: many mark a time limit as terminal."""
        if limit is None:
            return self
        cut = self.ends[self.lengths == limit] - 1
        terminated, truncated = self.terminated.copy(), self.truncated.copy()
        terminated[cut], truncated[cut] = False, True
        return replace(self, terminated=terminated, truncated=truncated)

    def with_next_observations(
        self,
        next_observations: Float[ndarray, "N S"],
        *,
        are_single: bool | None = None,
        after: Float[ndarray, "1 S"] | None = None,
    ) -> TransitionDataset:
        """The observation after each episode out of those after each step.

        Where it is the first one of the next episode, the log shows the reset, and what came before it is unknown; but
        not where all episodes are single steps, whose next observations are those of the step that followed. Of a part
        of a log it is given whether all of the log's are, and the first observation `after` the part, if there is one.
        """
        finals = next_observations[self.ends - 1].astype(np.float32)
        if (self.lengths == 1).all() if are_single is None else are_single:
            return replace(self, final_observations=finals)
        firsts = self.observations[self.starts[1:]]
        firsts = firsts if after is None else np.concatenate([firsts, after])
        resets = np.flatnonzero((finals[: len(firsts)] == firsts).all(axis=1))
        finals[resets] = np.nan
        return replace(self, final_observations=finals)

    @property
    def are_ends_known(self) -> Bool[ndarray, "E"]:
        """Whether the environment ended the episode, or the observation after its last step was logged."""
        ended = self.terminated[self.ends - 1]
        finals = self.final_observations
        return ended if finals is None else ended | np.isfinite(finals).all(axis=1)

    @property
    def known_finals(self) -> Float[ndarray, "E S"]:
        """The observation after each last step; NaN where it was not logged."""
        if self.final_observations is not None:
            return self.final_observations
        return np.full((self.num_episodes, self.observations.shape[1]), np.nan, np.float32)

    def split(self, fraction: float, *, seed: int) -> tuple[TransitionDataset, TransitionDataset]:
        """(the rest, `fraction` of the episodes drawn at random): whole episodes, so that none leaks.

        Raises:
            DataError: nothing would be left to train on.
        """
        held_out = held_out_episodes(self.num_episodes, fraction, seed=seed)
        rest = np.setdiff1d(np.arange(self.num_episodes), held_out)
        return self.select(rest), self.select(held_out)

    def without_last_steps(self, episodes: Bool[ndarray, "E"]) -> TransitionDataset:
        """Without the last step of these episodes, and without those of which nothing remains.

        Raises:
            DataError: nothing remains at all.
        """
        if not episodes.any():
            return self
        rows = np.ones(self.num_transitions, bool)
        rows[self.ends[episodes] - 1] = False
        lengths = self.lengths - episodes
        remain = lengths > 0
        if not remain.any():
            raise DataError("all episodes are one step long, and what came after it was not logged")
        columns = dict.fromkeys((*STEP_FIELDS, "returns_to_go"), rows)
        columns |= dict.fromkeys(("episode_ids", "first_timesteps", "final_observations"), remain)
        kept = {name: getattr(self, name)[which] for name, which in columns.items() if getattr(self, name) is not None}
        return TransitionDataset(**kept, starts=(np.cumsum(lengths) - lengths)[remain])

    def with_return_source(self, source: Literal["column", "rewards"] | None) -> TransitionDataset:
        """The same with its logged returns-to-go, or without them; None leaves them as they are.

        Raises:
            DataError: there are none.
        """
        if source == "column" and self.returns_to_go is None:
            raise DataError("data.return_source=column, but the data has no column returns_to_go at every step")
        return replace(self, returns_to_go=None) if source == "rewards" else self


def join_episodes(parts: Sequence[TransitionDataset]) -> TransitionDataset:
    """The episodes of all parts, one after the other, numbered anew."""
    offsets = np.cumsum([0, *(part.num_transitions for part in parts)])[:-1]
    firsts = [
        np.zeros(part.num_episodes, np.int64) if part.first_timesteps is None else part.first_timesteps
        for part in parts
    ]
    to_go = [part.returns_to_go for part in parts]
    finals = [part.known_finals for part in parts]
    return TransitionDataset(
        **{name: np.concatenate([getattr(part, name) for part in parts]) for name in STEP_FIELDS},
        returns_to_go=None if any(each is None for each in to_go) else np.concatenate(to_go),  # type: ignore[arg-type]
        final_observations=np.concatenate(finals)
        if any(part.final_observations is not None for part in parts)
        else None,
        starts=np.concatenate([part.starts + offset for part, offset in zip(parts, offsets, strict=True)]),
        first_timesteps=np.concatenate(firsts) if any(part.first_timesteps is not None for part in parts) else None,
    )


def chosen_episodes(
    episode_ids: Int[ndarray, "E"],
    episode_returns: Float[ndarray, "E"],
    *,
    max_episodes: int | None,
    top_fraction: float,
) -> Int[ndarray, "C"]:
    """The first `max_episodes` by id, of those the `top_fraction` with the highest returns, in their ids' order.

    Of equal returns the first by id count as higher: ids sort as the log's do, in whatever order it was read.
    """
    first = np.argsort(episode_ids, kind="stable")[:max_episodes]
    # The fewest whose share is as large. Of 100 episodes 0.07 are 7, though 0.07 * 100 is above 7 in floats.
    num = int(np.searchsorted(np.arange(len(first) + 1) / max(1, len(first)), top_fraction))
    best = np.argsort(-episode_returns[first], kind="stable")[:num]
    return first[np.sort(best)]


def held_out_episodes(num_episodes: int, fraction: float, *, seed: int) -> Int[ndarray, "H"]:
    """Which of the episodes are for validation: `fraction` of them at random, in order.

    Raises:
        DataError: nothing would be left to train on.
    """
    num_held_out = round(num_episodes * fraction)
    if num_held_out >= num_episodes:
        raise DataError(
            f"holding out {fraction:.0%} of {num_episodes} episode(s) leaves none to train on; "
            f"lower data.validation_fraction"
        )
    return np.sort(np.random.default_rng(seed).permutation(num_episodes)[:num_held_out])

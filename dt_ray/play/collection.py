"""Collects datasets; the folder of a dataset appears only when it is complete."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dt_ray.config.modules import allow_modules, allowed_modules
from dt_ray.config.schema import NUM_EVALUATION_SEEDS
from dt_ray.data.logs.episodes import from_table, to_table
from dt_ray.data.spaces import SpaceSpec, misfit_of, read_spaces
from dt_ray.data.summary import DatasetSummary
from dt_ray.environments.batched import try_environment
from dt_ray.environments.behaviors import NAMES, make_behavior
from dt_ray.errors import DataError, UserError
from dt_ray.learners import Policy
from dt_ray.play.rollout import join_rollouts, rollout
from dt_ray.runs.checkpoint import load_policy
from dt_ray.runs.folder import checkpoint_at
from dt_ray.runs.storage import Folder

EPISODES_PER_FILE = 100


@dataclass(frozen=True, kw_only=True)
class CollectionPlan:
    """Episodes `0..num_episodes-1` of a behaviour; episode i resets its environment with `seed + i`."""

    env_id: str
    behavior: str
    num_episodes: int
    seed: int
    max_timesteps: int = 1000  # the environment's own time limit usually comes first
    target_return: float | None = None  # of a checkpoint; None: the highest that it was evaluated at
    env_kwargs: dict[str, Any] = field(default_factory=dict)  # arguments of the environment's constructor
    max_envs: int = 100  # environments open at once, in all processes together
    spec: SpaceSpec | None = None  # with action bounds for `random`; None: the environment's own
    modules: tuple[str, ...] = field(
        default_factory=allowed_modules
    )  # modules that a checkpoint may name, for other processes

    def __post_init__(self) -> None:
        if (place := self._checkpoint()) is not None:
            object.__setattr__(self, "behavior", str(place))  # absolute: tasks have other working directories

    def _checkpoint(self) -> Folder | None:
        """The run or checkpoint that is the behaviour, if it is one."""
        is_function = ":" in self.behavior and "://" not in self.behavior
        if self.behavior in NAMES or is_function or not (place := Folder.at(self.behavior)).exists():
            return None
        return place

    def check(self) -> None:
        """Raises:
        UserError: no such behaviour, an environment that can't be played, or seeds that belong to evaluation.
        """
        if self.num_episodes < 1 or self.max_timesteps < 1:
            raise UserError("a dataset has at least one episode of at least one step")
        if self.seed < NUM_EVALUATION_SEEDS:
            raise UserError(
                f"the seeds 0..{NUM_EVALUATION_SEEDS - 1} are for evaluation; give --seed {NUM_EVALUATION_SEEDS} or "
                f"more, got {self.seed}"
            )
        self.make_policy([self.seed])
        try_environment(self.env_id, self.env_kwargs, seed=self.seed)

    def chunks(self) -> list[range]:
        """The episodes of each file."""
        total, size = self.num_episodes, EPISODES_PER_FILE
        return [range(begin, min(begin + size, total)) for begin in range(0, total, size)]

    @property
    def source(self) -> str:
        """Where the episodes come from, in words."""
        return f"{self.behavior} episodes of {self.env_id}, seeds {self.seed} to {self.seed + self.num_episodes - 1}"

    def make_policy(self, seeds: list[int]) -> tuple[Policy, float]:
        """The policy for the episodes with these seeds, and its target return."""
        spec = self.spec or read_spaces(self.env_id, self.env_kwargs)
        place = self._checkpoint()
        if place is None:
            if self.behavior == "random" and not spec.is_bounded:
                raise UserError(
                    f"random actions are drawn within bounds, and {self.env_id} has none; give some by "
                    f"--action-bounds (data.action_bounds), or the actions by --behavior module:function"
                )
            return make_behavior(self.behavior, self.env_id, spec, seeds=seeds), 0.0
        allow_modules(*self.modules)
        policy, facts = load_policy(checkpoint_at(place))
        if (misfit := misfit_of(facts.spec, facts.action_bounds, spec)) is not None:
            where = f"acts in {facts.env_id}" if facts.env_id else "was trained without an environment (env_id=null)"
            raise UserError(f"{self.behavior} {where}, and its spaces are not those of {self.env_id}: {misfit}")
        asked = max(facts.evaluation.target_returns, default=0.0)
        target = asked if self.target_return is None else self.target_return
        return policy, target


def collect_chunk(plan: CollectionPlan, episodes: range, *, num_processes: int = 1) -> pa.Table:
    """Plays these episodes, as many at once as this process may open; the table does not depend on that number."""
    size = max(1, plan.max_envs // num_processes)
    parts = []
    for begin in range(0, len(episodes), size):
        seeds = [plan.seed + episode for episode in episodes[begin : begin + size]]
        policy, target = plan.make_policy(seeds)
        parts.append(
            rollout(
                policy,
                plan.env_id,
                seeds=seeds,
                target_returns=[target] * len(seeds),
                max_timesteps=plan.max_timesteps,
                env_kwargs=plan.env_kwargs,
            )
        )
    spec = read_spaces(plan.env_id, plan.env_kwargs)
    metadata = {
        "env_id": plan.env_id,
        **({"env_kwargs": plan.env_kwargs} if plan.env_kwargs else {}),
        **({"action_low": spec.action_low, "action_high": spec.action_high} if spec.is_bounded else {}),
        "behavior": plan.behavior,
    }
    return to_table(join_rollouts(parts).to_dataset(list(episodes)), metadata)


def collect_here(plan: CollectionPlan) -> Iterator[pa.Table]:
    """All chunks, one after the other, in this process."""
    return (collect_chunk(plan, episodes) for episodes in plan.chunks())


def write_dataset(
    out: str,
    tables: Iterable[pa.Table],
    *,
    source: str,
    licence: str | None = None,
    flat: bool = False,
    overwrite: bool = False,
) -> DatasetSummary:
    """Writes a file for each table of episodes into a new local folder, which appears when complete, and a card.

    `source` and `licence` are for the card, beside the folder as `OUT.README.md`; `flat` writes a row per step.

    Raises:
        DataError: something is there already, perhaps from another process meanwhile, or the disk can't be written.
    """
    if "://" in out:
        raise DataError(f"datasets are written to a local folder; write one and copy it to {out}")
    folder = Path(out).expanduser().absolute()
    if folder.exists() and not overwrite:
        raise DataError(f"{out} exists already; choose another folder, or replace it with --overwrite")
    # Of this process alone: another one may be writing the same dataset.
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.partial")
    summary = DatasetSummary()
    try:
        temporary.mkdir(parents=True)
        for count, table in enumerate(tables):
            summary.add(from_table(table, source=out))
            part = temporary / f"part-{count:05d}.parquet"
            pq.write_table(flatten(table) if flat else table, part, write_page_checksum=True)
        if not _put(temporary, folder, overwrite=overwrite):
            raise DataError(f"{out} was written by another process meanwhile; that one is kept (or give --overwrite)")
        card = summary.card(folder.name, source=source, licence=licence)
        (folder.parent / f"{folder.name}.README.md").write_text(card)
    except OSError as error:
        raise DataError(f"can't write {out}: {error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return summary


def _put(temporary: Path, folder: Path, *, overwrite: bool) -> bool:
    """Renames the folder; returns False where its name is taken and may not be replaced."""
    while True:
        if folder.exists():
            if not overwrite:
                return False
            replaced = folder.with_name(f"{temporary.name}.replaced")
            with suppress(FileNotFoundError):  # another process replaces it, too
                folder.rename(replaced)
            shutil.rmtree(replaced, ignore_errors=True)
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.exists():
                raise
        else:
            return True


def flatten(table: pa.Table) -> pa.Table:
    """A row per step, in the column names that flat datasets have by default."""
    data = from_table(table, source="collected episodes")
    return pa.table(
        {
            "episode_id": np.repeat(data.episode_ids, data.lengths),
            "timestep": data.timesteps,
            "observation": list(data.observations),
            "action": list(data.actions),
            "reward": data.rewards,
            "terminated": data.terminated,
            "truncated": data.truncated,
        }
    )

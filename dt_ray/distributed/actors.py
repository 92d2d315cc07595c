"""The classes of our own actors. What they need is imported when it is used: an actor starts beside the workers, on the
same cores, and every second that it takes them is a second until the first update.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dt_ray.config import EvaluationConfig
    from dt_ray.evaluation import EpisodeResults
    from dt_ray.learners import Policy


class EpisodePlayer:
    """Plays episodes. Its work depends on its arguments alone, so that a lost actor's can be done again."""

    def try_environment(self, env_id: str, env_kwargs: Mapping[str, Any], seed: int) -> None:
        """Plays two steps and a reset of an environment, before a training that it would spoil."""
        from dt_ray.environments import try_environment

        try_environment(env_id, env_kwargs, seed=seed)

    def play(
        self,
        policy: Policy,
        env_id: str,
        config: EvaluationConfig,
        episodes: Sequence[int],
        env_kwargs: Mapping[str, Any],
    ) -> EpisodeResults:
        import torch

        from dt_ray.evaluation import play

        torch.set_num_threads(1)  # small batches: a second thread slows them, and stops them on a loaded machine
        return play(policy, env_id, config, episodes, env_kwargs)


class StopSign:
    """Through it the driver asks the workers to stop."""

    def __init__(self) -> None:
        self._asked = asyncio.Event()

    async def ask(self) -> None:
        self._asked.set()

    async def wait(self) -> None:
        await self._asked.wait()

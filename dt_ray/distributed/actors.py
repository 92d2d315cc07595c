"""The classes of our actors. They import what they need when they use it, because actors start on the workers' cores
and would delay the first update.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dt_ray.config.schema import EvaluationConfig
    from dt_ray.learners import Policy
    from dt_ray.play.evaluation import EpisodeResults


class EpisodePlayer:
    """Plays episodes. The results depend on the arguments alone, so that the work of a lost actor can be repeated."""

    def is_ready(self) -> bool:
        """Answered once the actor has its place and its process."""
        return True

    def play(
        self,
        policy: Policy,
        env_id: str,
        config: EvaluationConfig,
        episodes: Sequence[int],
        env_kwargs: Mapping[str, Any],
    ) -> EpisodeResults:
        import torch

        from dt_ray.play.evaluation import play

        torch.set_num_threads(1)  # small batches: a second thread slows them, and stops them on a loaded machine
        return play(policy, env_id, config, episodes, env_kwargs)


class RunBoard:
    """Messages between the driver, Ray Train's controller and the workers of one run.

    A restarted actor has forgotten them, so a request is repeated until it is fulfilled.
    """

    def __init__(self) -> None:
        self._asked = asyncio.Condition()
        self._requests: set[str] = set()
        self._state: dict[str, Any] = {
            "controller": None,
            "controller_id": None,
            "is_placed": False,
            "has_ended": False,
            "failure": None,
        }

    async def ask(self, request: str) -> None:
        """Asks the workers for `stop` or `move`."""
        async with self._asked:
            self._requests.add(request)
            self._asked.notify_all()

    async def wait(self) -> str:
        """Waits for a request to the workers and returns it."""
        async with self._asked:
            await self._asked.wait_for(lambda: bool(self._requests))
            return "stop" if "stop" in self._requests else "move"

    async def move(self, *, within_s: float) -> bool:
        """Asks the workers to end, because their number changes; returns whether they did within so many seconds."""
        await self.ask("move")
        async with self._asked:
            try:
                await asyncio.wait_for(self._asked.wait_for(lambda: "move" not in self._requests), within_s)
            except asyncio.TimeoutError:
                self._requests.discard("move")
                return False
        return True

    async def note_end(self) -> None:
        """Called when rank 0 has ended and everything is written."""
        async with self._asked:
            self._requests.discard("move")
            self._state["has_ended"] = True
            self._asked.notify_all()

    async def note(self, **facts: Any) -> None:
        self._state |= facts

    async def look(self) -> dict[str, Any]:
        return self._state

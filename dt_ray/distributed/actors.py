"""The classes of our own actors. What they need is imported when it is used: an actor starts beside the workers, on the
same cores, and every second that it takes them is a second until the first update.
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
    """Plays episodes. Its work depends on its arguments alone, so that a lost actor's can be done again."""

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
    """What the driver, Ray Train's controller and the workers of one run tell each other.

    An actor that is started again has forgotten all of it: whoever asks for something asks again until it is done.
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
        """What the workers are asked for, when they are."""
        async with self._asked:
            await self._asked.wait_for(lambda: bool(self._requests))
            return "stop" if "stop" in self._requests else "move"

    async def move(self, *, within_s: float) -> bool:
        """Asks the workers to make room for another number of them; whether they did within so many seconds."""
        await self.ask("move")
        async with self._asked:
            try:
                await asyncio.wait_for(self._asked.wait_for(lambda: "move" not in self._requests), within_s)
            except asyncio.TimeoutError:
                self._requests.discard("move")
                return False
        return True

    async def note_end(self) -> None:
        """Rank 0 has ended, with all that it had to write."""
        async with self._asked:
            self._requests.discard("move")
            self._state["has_ended"] = True
            self._asked.notify_all()

    async def note(self, **facts: Any) -> None:
        self._state |= facts

    async def look(self) -> dict[str, Any]:
        return self._state

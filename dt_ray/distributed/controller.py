"""Ray Train's controller: its messages to the run, and a `fit` that logs what it waits for and gives up in time."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextlib import suppress
from typing import Any

import ray
import ray.exceptions
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
from ray.train.v2._internal.execution.controller.state import ResizingState

from dt_ray.distributed.usage import describe_free, find_groups, remove_group
from dt_ray.errors import ResourceError
from dt_ray.training.interrupts import StoppedEarlyError

log = logging.getLogger("dt_ray")

LOOK_EVERY_S = 1.0
ANSWERS_WITHIN_S = 10.0  # the board; after that it is being restarted
MOVES_WITHIN_S = 120.0  # workers, when their number changes
ENDS_WITHIN_S = 20.0  # workers of which one has failed, before they are ended from here
STOPS_WITHIN_S = 10.0  # a run that was asked to stop and has no workers
PLACED_WITHIN_S = 60.0  # workers, where `scaling.wait_for_nodes_s` is shorter
PLACED_AGAIN_WITHIN_S = 600.0  # those of a run that has lost some, for whose node another one may come
SAYS_AFTER_S = 10.0
SAYS_EVERY_S = 60.0


class TellsTheRun(ControllerCallback, WorkerGroupCallback):
    """Runs in the controller: tells the board its id and whether workers are placed; lets them save before a resize."""

    def __init__(self, board: Any) -> None:
        self.board = board

    def after_controller_start(self, train_run_context: Any) -> None:
        context = ray.get_runtime_context()
        self.board.note.remote(controller=context.current_actor, controller_id=context.get_actor_id())

    def after_worker_group_start(self, worker_group: Any) -> None:
        self.board.note.remote(is_placed=True, has_ended=False)

    def before_worker_group_shutdown(self, worker_group: Any) -> None:
        self.board.note.remote(is_placed=False)

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        if isinstance(current_state, ResizingState):  # decided, and carried out after this
            with suppress(ray.exceptions.RayError):
                ray.get(self.board.move.remote(within_s=MOVES_WITHIN_S), timeout=2 * MOVES_WITHIN_S)


class Fit:
    """`trainer.fit()` in a thread, so that signals are handled by us and not by Ray Train, which drops the workers.

    Ray Train replaces lost workers but not its own controller; if that is lost, `fit` is called again. Ray Train would
    wait for ever for workers that can't be placed, and for workers that continue when another one has failed; here a
    warning says what it waits for, and after some time the run ends.
    """

    def __init__(self, trainer: TorchTrainer, board: Any, *, max_failures: int, needs: str, wait_s: float) -> None:
        self.trainer, self.board, self.needs, self.wait_s = trainer, board, needs, wait_s
        self.is_asked_to_stop = threading.Event()
        self._has_ended = threading.Event()
        self._controller: Any = None
        self._controller_id: str | None = None
        self._was_placed = False
        self._outcome: Future[Any] = Future()
        self._thread = threading.Thread(target=self._fit, args=(max_failures,), daemon=True, name="fit")

    def ask_to_stop(self) -> None:
        self.is_asked_to_stop.set()  # and asked again until the workers have ended: a board forgets
        self.board.ask.remote("stop")

    def run(self) -> Any:
        """What rank 0 returned.

        Raises:
            ResourceError: the workers were not placed in time.
            UserError: what a worker ended with, where the others didn't end with it.
            StoppedEarlyError: the run was asked to stop and has no workers that could.
        """
        self._thread.start()
        try:
            return self._watch()
        finally:
            self._has_ended.set()  # before anything else ends: a new fit would start another Ray

    def _fit(self, attempts_left: int) -> None:
        try:
            self._outcome.set_result(self.trainer.fit().return_value)
        except ray.exceptions.RayActorError as error:
            if attempts_left == 0 or self._has_ended.is_set():
                self._outcome.set_exception(error)
                return
            log.warning("lost Ray Train's controller; resuming from the newest checkpoint")
            with suppress(ray.exceptions.RayError):
                self._look()
            self._free_workers()  # else their CPUs are taken for ever
            self._fit(attempts_left - 1)
        except BaseException as error:
            self._outcome.set_exception(error)

    def _watch(self) -> Any:
        failed_for, unplaced_for, stopping_for = Clock(), Clock(), Clock()
        said = -SAYS_EVERY_S
        while not wait([self._outcome], timeout=LOOK_EVERY_S).done:
            if self.is_asked_to_stop.is_set():
                self.board.ask.remote("stop")
            state = self._look()
            if state is None:
                continue
            self._was_placed |= state["is_placed"]
            if failed_for.seconds_while(state["failure"] is not None) > ENDS_WITHIN_S:
                self._end()
                raise state["failure"]
            if stopping_for.seconds_while(self.is_asked_to_stop.is_set() and not state["is_placed"]) > STOPS_WITHIN_S:
                self._end()
                raise StoppedEarlyError
            waited = unplaced_for.seconds_while(self._is_waiting(state))
            if waited == 0:
                said = -SAYS_EVERY_S
                continue
            limit = max(self.wait_s, PLACED_AGAIN_WITHIN_S if self._was_placed else PLACED_WITHIN_S)
            if waited > limit:
                self._end()
                raise ResourceError(
                    f"{self.needs} had no place for {limit:g} s: {describe_free()}. Ask for less, or wait longer: "
                    f"scaling.wait_for_nodes_s={2 * limit:g}"
                )
            if waited > SAYS_AFTER_S and waited - said >= SAYS_EVERY_S:
                said = waited
                log.warning("waiting up to %g s for room for %s: %s", limit, self.needs, describe_free())
        return self._outcome.result()

    def _is_waiting(self, state: dict[str, Any]) -> bool:
        """Whether the workers wait for a place. Ray Train removes a placement group that waits and makes a new one."""
        if state["is_placed"] or self._controller_id is None:
            return False
        groups = find_groups(creator=self._controller_id)
        return any(group.is_waiting for group in groups) or not (groups or state["has_ended"])

    def _look(self) -> dict[str, Any] | None:
        try:
            state: Any = ray.get(self.board.look.remote(), timeout=ANSWERS_WITHIN_S)
        except ray.exceptions.RayError:
            return None
        self._controller = state["controller"] or self._controller
        self._controller_id = state["controller_id"] or self._controller_id
        return state

    def _end(self) -> None:
        """Ends the controller, and its workers with it."""
        self._has_ended.set()
        if self._controller is not None:
            with suppress(ray.exceptions.RayError):
                ray.kill(self._controller)
        self._free_workers()

    def _free_workers(self) -> None:
        """Removes the placement groups of the controller that is gone, and no others."""
        if self._controller_id is not None:
            for group in find_groups(creator=self._controller_id):
                remove_group(group)


class Clock:
    """Measures how long a condition has held without a break."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now, self._since = now, None

    def seconds_while(self, holds: bool) -> float:
        """Seconds since the condition first held; 0 while it doesn't."""
        if not holds:
            self._since = None
            return 0.0
        self._since = self._now() if self._since is None else self._since
        return max(self._now() - self._since, 1e-9)

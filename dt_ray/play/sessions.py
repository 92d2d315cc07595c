"""Sessions: live episodes of a policy that step at different times, as a server needs; actions are computed together.

Legend: N episodes that act together, S observation, A action dimension.
"""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray
from torch.nn.utils.rnn import pad_sequence

from dt_ray.data.spaces import SpaceSpec
from dt_ray.errors import UserError
from dt_ray.learners.base import Policy, as_window_policy
from dt_ray.learners.policies import WindowContext, scaled_targets
from dt_ray.models.batch import WindowBatch

MAX_NAME_LENGTH = 64  # characters of an unknown name that a message repeats


class RefusedError(Exception):
    """A request that can't be answered, with the HTTP status that says so."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status, self.reason = status, reason


@dataclass
class Session:
    """One episode: the steps that the policy sees, and the action computed for the newest one."""

    steps: WindowContext
    used_at: float
    action: Float[ndarray, "A"] | None = None


class Sessions:
    """The live episodes, bounded in number and idle time. Each acts as a policy of its own would."""

    def __init__(
        self,
        policy: Policy,
        spec: SpaceSpec,
        *,
        max_sessions: int = 1000,
        idle_s: float = 600.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Raises:
        UserError: the policy is one of its own kind that can't be served.
        """
        self.policy, self.spec = as_window_policy(policy), spec
        self.max_sessions, self.idle_s, self.clock = max_sessions, idle_s, clock
        self._sessions: dict[str, Session] = {}
        self.max_timesteps: int | None = getattr(policy, "max_timesteps", None)  # steps that an episode may have

    def __len__(self) -> int:
        return len(self._sessions)

    def start(self, observation: Sequence[float], target_return: float) -> str:
        """Begins an episode; returns its name.

        Raises:
            RefusedError: the observation is malformed, or too many episodes are live.
        """
        first = self._checked("observation", observation, self.spec.observation_dim)
        if target_return == math.inf:
            wanted = np.array([target_return])
        else:
            wanted = self._checked("target_return", [target_return], 1).astype(np.float64)
        try:
            asked = scaled_targets(self.policy, wanted)
        except UserError as error:
            raise RefusedError(422, str(error)) from None
        self.drop_idle()
        if len(self._sessions) >= self.max_sessions:
            raise RefusedError(503, f"{self.max_sessions} sessions are live already; end one, or wait")
        name = uuid.uuid4().hex
        steps = WindowContext(
            self.policy.normalizer.normalize_observations(first[None]),
            asked,
            self.policy.normalizer.returns_while_acting(self.policy.return_scale),
            action_dim=self.spec.action_dim,
            context_length=self.policy.history_length,
        )
        self._sessions[name] = Session(steps, used_at=self.clock())
        return name

    def observe(
        self, name: str, observation: Sequence[float], reward: float, action: Sequence[float] | None = None
    ) -> None:
        """Adds a reward and the next observation; `action` is the action taken, if it differs from the computed one.

        Raises:
            RefusedError: no such session, its episode is too long, or a value is malformed.
        """
        session = self._find(name)
        seen = self._checked("observation", observation, self.spec.observation_dim)
        earned = float(self._checked("reward", [reward], 1)[0])
        if session.action is None:
            raise RefusedError(409, "the step before has no action yet")
        done = session.action if action is None else self._checked("action", action, self.spec.action_dim)
        if self.max_timesteps is not None and session.steps.num_steps >= self.max_timesteps:
            raise RefusedError(409, f"the policy was trained for episodes of up to {self.max_timesteps} steps")
        session.used_at = self.clock()
        session.action = None
        normalizer = self.policy.normalizer
        session.steps.append(
            normalizer.normalize_actions(done[None]),
            np.array([earned]) * self.policy.return_scale,
            normalizer.normalize_observations(seen[None]),
        )

    @torch.inference_mode()
    def act(self, names: Sequence[str]) -> list[Float[ndarray, "A"] | RefusedError]:
        """The next actions of these episodes, computed together; a refusal for each one that has ended meanwhile."""
        sessions = [session for name in dict.fromkeys(names) if (session := self._sessions.get(name)) is not None]
        if sessions:
            for session, action in zip(sessions, self._act_together(sessions), strict=True):
                session.action, session.used_at = action, self.clock()
        return [self._action_of(name) for name in names]

    def _action_of(self, name: str) -> Float[ndarray, "A"] | RefusedError:
        session = self._sessions.get(name)
        return self._gone(name) if session is None or session.action is None else session.action

    def _act_together(self, sessions: Sequence[Session]) -> Float[ndarray, "N A"]:
        predicted = self.policy.model.predict_last_action(_joined(sessions))
        return self.policy.normalizer.denormalize_actions(predicted.numpy())

    def end(self, name: str) -> None:
        """Forgets an episode.

        Raises:
            RefusedError: no such session.
        """
        self._find(name)
        del self._sessions[name]

    def drop_idle(self) -> None:
        """Forgets the episodes that nobody has stepped for `idle_s` seconds."""
        oldest = self.clock() - self.idle_s
        self._sessions = {name: each for name, each in self._sessions.items() if each.used_at > oldest}

    def _find(self, name: str) -> Session:
        self.drop_idle()
        if name not in self._sessions:
            raise self._gone(name)
        return self._sessions[name]

    def _gone(self, name: str) -> RefusedError:
        shown = name if len(name) <= MAX_NAME_LENGTH else f"{name[:MAX_NAME_LENGTH]}…"
        return RefusedError(404, f"no session {shown!r}: it was ended, or dropped after {self.idle_s:g} idle seconds")

    def _checked(self, name: str, values: Sequence[float], num: int) -> Float[ndarray, "num"]:
        if len(values) != num:  # before anything is made of them
            raise RefusedError(422, f"{name} is {num} finite number(s), got {len(values)}")
        with np.errstate(over="ignore"):  # what is beyond float32 is refused
            try:
                array = np.asarray(values, np.float32)
            except (TypeError, ValueError, OverflowError):
                raise RefusedError(422, f"{name} is {num} finite number(s), got something else") from None
        if array.shape != (num,) or not np.isfinite(array).all():
            raise RefusedError(422, f"{name} is {num} finite number(s), got one that is not")
        return array


def _joined(sessions: Sequence[Session]) -> WindowBatch:
    """The kept steps of each, padded on the right."""
    columns = [vars(session.steps.as_batch()) for session in sessions]
    tensors = {name: [each[name][0] for each in columns] for name, value in columns[0].items() if value is not None}
    return WindowBatch(**{name: pad_sequence(values, batch_first=True) for name, values in tensors.items()})

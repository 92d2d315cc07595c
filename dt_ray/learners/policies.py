"""A return-conditioned policy: the model, the units, and the last steps of every live episode.

Legend: N live episodes, S observation, A action dimension, W floats a step.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from torch import Tensor

from dt_ray.data.normalizer import Normalizer
from dt_ray.data.returns import ReturnRecursion
from dt_ray.errors import UserError
from dt_ray.learners.base import WindowPolicy
from dt_ray.models.batch import WindowBatch
from dt_ray.models.decision_transformer import DecisionTransformerModel
from dt_ray.models.transformer import KeyValueCache


class DecisionTransformerPolicy:
    """Acts on the last `context_length` steps, asking at each for the return that is still missing, or for none."""

    def __init__(
        self,
        model: DecisionTransformerModel,
        normalizer: Normalizer,
        *,
        context_length: int | None = None,
        is_conditioned: bool = True,
    ) -> None:
        self.context_length = context_length or model.config.context_length
        if model.config.attention == "band" and self.context_length != model.config.context_length:
            model = copy.deepcopy(model)  # so that whoever runs the policy's model sees as much as the policy
            model.transformer.set_band(self.context_length)
        self.model = model.eval()
        self.return_scale = normalizer.return_scale if is_conditioned else 0.0
        self.normalizer = normalizer

    @property
    def max_timesteps(self) -> int | None:
        """Steps that an episode may have; None: any number."""
        config = self.model.config
        return None if config.clamp_timesteps else config.max_timesteps

    @property
    def history_length(self) -> int:
        """Newest steps of an episode that an action depends on: under a band, further back with every layer."""
        config = self.model.config
        if config.attention != "band":
            return self.context_length
        reached = config.num_layers * (self.context_length - 1) + 1
        return reached if config.clamp_timesteps else min(reached, config.max_timesteps)

    def start(self, observations: Float[ndarray, "N S"], target_returns: Float[ndarray, "N"]) -> None:
        make_context = CachedContext if self.model.config.attention == "band" else WindowContext
        self._context: Context = make_context(
            self.normalizer.normalize_observations(observations),
            scaled_targets(self, target_returns),
            self.normalizer.returns_while_acting(self.return_scale),
            action_dim=self.model.action_dim,
            context_length=self.context_length,
        )

    @torch.inference_mode()
    def act(self) -> Float[ndarray, "N A"]:
        return self.normalizer.denormalize_actions(self._context.predict(self.model).numpy())

    @torch.inference_mode()
    def observe(
        self, actions: Float[ndarray, "N A"], rewards: Float[ndarray, "N"], observations: Float[ndarray, "N S"]
    ) -> None:
        self._context.append(
            self.normalizer.normalize_actions(actions),
            np.asarray(rewards, np.float64) * self.return_scale,
            self.normalizer.normalize_observations(observations),
        )

    @torch.inference_mode()
    def keep(self, episodes: Sequence[int] | Int[ndarray, "M"]) -> None:
        self._context.keep(episodes)


def scaled_targets(policy: WindowPolicy, target_returns: Float[ndarray, "N"]) -> Float[ndarray, "N"]:
    """Target returns in the model's units; all 0 for a policy that looks at none.

    Raises:
        UserError: as much as can be had is asked of a model that doesn't know how much that is.
    """
    targets = np.asarray(target_returns, np.float64)
    if not policy.return_scale:
        return np.zeros_like(targets)
    if np.isinf(targets).any() and not getattr(policy.model, "takes_max", False):
        raise UserError(
            "target return max: this policy does not know how much a state can give; ask for a number, or train with "
            "model.conditioning=head or data.return_source=value"
        )
    return targets * policy.return_scale


class Context(Protocol):
    """What a policy remembers of N episodes that started together, in the model's units."""

    def predict(self, model: DecisionTransformerModel) -> Float[Tensor, "N A"]:
        """The model's actions for the newest steps."""
        ...

    def append(
        self, actions: Float[ndarray, "N A"], rewards: Float[ndarray, "N"], observations: Float[ndarray, "N S"]
    ) -> None:
        """Completes the newest step with its action and begins the next one."""
        ...

    def keep(self, episodes: Sequence[int] | Int[ndarray, "M"]) -> None:
        """Goes on with these episodes only."""
        ...


class CachedContext:
    """The newest step, and the keys and values of those before it; for a model with `attention: band`."""

    def __init__(
        self,
        observations: Float[ndarray, "N S"],
        targets: Float[ndarray, "N"],
        recursion: ReturnRecursion,
        *,
        action_dim: int,
        context_length: int,
    ) -> None:
        self._cache = KeyValueCache(context_length)
        self._recursion = recursion
        self._returns_to_go = recursion.start(targets)  # float64: 1,000 subtractions lose nothing
        self._timestep = -1
        self._begin_step(np.zeros((len(observations), action_dim), np.float32), observations)

    def predict(self, model: DecisionTransformerModel) -> Float[Tensor, "N A"]:
        return model.predict_next_action(self._newest, self._cache)

    def append(
        self, actions: Float[ndarray, "N A"], rewards: Float[ndarray, "N"], observations: Float[ndarray, "N S"]
    ) -> None:
        self._returns_to_go = self._recursion.follow(self._returns_to_go, rewards, self._timestep + 1)
        self._begin_step(actions, observations)

    def keep(self, episodes: Sequence[int] | Int[ndarray, "M"]) -> None:
        rows = torch.as_tensor(np.asarray(episodes))
        self._cache.keep(rows)
        self._returns_to_go = self._returns_to_go[episodes]
        self._newest = self._newest.map(lambda values: values[rows])

    def _begin_step(self, previous_actions: Float[ndarray, "N A"], observations: Float[ndarray, "N S"]) -> None:
        self._cache.begin_token()
        self._timestep += 1
        one = (len(observations), 1)
        previous = torch.as_tensor(previous_actions)[:, None]
        self._newest = WindowBatch(
            observations=torch.as_tensor(observations)[:, None],
            actions=torch.zeros_like(previous),  # is what is asked for
            previous_actions=previous,
            returns_to_go=torch.as_tensor(self._returns_to_go.astype(np.float32))[:, None],
            timesteps=torch.full(one, self._timestep),
            mask=torch.ones(one, dtype=torch.bool),
        )


class WindowContext:
    """The last `context_length` steps, all of them seen anew at each step.

    One preallocated buffer of twice that length: steps are written behind one another, and when it is full its newest
    half moves to the front, so that the context is always one slice of it.
    """

    def __init__(
        self,
        observations: Float[ndarray, "N S"],
        targets: Float[ndarray, "N"],
        recursion: ReturnRecursion,
        *,
        action_dim: int,
        context_length: int,
    ) -> None:
        num, self.observation_dim = observations.shape
        self.action_dim, self.context_length = action_dim, context_length
        self._steps = torch.zeros(num, 2 * context_length, self.observation_dim + 2 * self.action_dim + 1)
        self._recursion = recursion
        self._returns_to_go = recursion.start(targets)  # float64: 1,000 subtractions lose nothing
        self._timestep, self._end = 0, 0
        self._write(np.zeros((num, self.action_dim), np.float32), observations)

    def predict(self, model: DecisionTransformerModel) -> Float[Tensor, "N A"]:
        return model.predict_last_action(self.as_batch(), padded=False)

    def append(
        self, actions: Float[ndarray, "N A"], rewards: Float[ndarray, "N"], observations: Float[ndarray, "N S"]
    ) -> None:
        actions_at = slice(self.observation_dim + self.action_dim, -1)
        self._steps[:, self._end - 1, actions_at] = torch.as_tensor(actions)
        if self._end == self._steps.shape[1]:
            kept = self.context_length - 1
            self._steps[:, :kept] = self._steps[:, self._end - kept :].clone()
            self._end = kept
        self._timestep += 1
        self._returns_to_go = self._recursion.follow(self._returns_to_go, rewards, self._timestep)
        self._write(actions, observations)

    def keep(self, episodes: Sequence[int] | Int[ndarray, "M"]) -> None:
        rows = torch.as_tensor(np.asarray(episodes))
        self._steps, self._returns_to_go = self._steps[rows], self._returns_to_go[episodes]

    @property
    def num_steps(self) -> int:
        """Steps of the episodes up to now."""
        return self._timestep + 1

    def as_batch(self) -> WindowBatch:
        """Windows of up to `context_length` steps, none of them padding; the newest action is still zero."""
        begin = max(0, self._end - self.context_length)
        steps = self._steps[:, begin : self._end]
        num, length = steps.shape[:2]
        sizes = [self.observation_dim, self.action_dim, self.action_dim, 1]
        observations, previous_actions, actions, returns_to_go = torch.split(steps, sizes, dim=-1)
        timesteps = torch.arange(self._timestep - length + 1, self._timestep + 1)
        return WindowBatch(
            observations=observations,
            actions=actions,
            previous_actions=previous_actions,
            returns_to_go=returns_to_go[..., 0],
            timesteps=timesteps.expand(num, length),
            mask=torch.ones(num, length, dtype=torch.bool),
        )

    def _write(self, previous_actions: Float[ndarray, "N A"], observations: Float[ndarray, "N S"]) -> None:
        zeros = np.zeros_like(previous_actions)
        step = np.concatenate([observations, previous_actions, zeros, self._returns_to_go[:, None]], axis=1)
        self._steps[:, self._end] = torch.as_tensor(step.astype(np.float32))
        self._end += 1

"""What the loop, the evaluation and the checkpoints ask of a learner and of the policy it makes.

Legend: N live episodes, S observation, A action dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from jaxtyping import Float, Int
from numpy import ndarray
from torch import Tensor

from dt_ray.data.normalizer import Normalizer
from dt_ray.data.spaces import SpaceSpec
from dt_ray.losses import Metrics
from dt_ray.models.batch import WindowBatch


class Policy(Protocol):
    """Acts in a batch of live episodes that step together."""

    def start(self, observations: Float[ndarray, "N S"], target_returns: Float[ndarray, "N"]) -> None:
        """Forgets what was, and begins N episodes that are to reach these returns."""
        ...

    def act(self) -> Float[ndarray, "N A"]:
        """The next action of every live episode, in the environment's units and bounds."""
        ...

    def observe(
        self, actions: Float[ndarray, "N A"], rewards: Float[ndarray, "N"], observations: Float[ndarray, "N S"]
    ) -> None:
        """What was done in every live episode, what it earned and what was seen next."""
        ...

    def keep(self, episodes: Sequence[int] | Int[ndarray, "M"]) -> None:
        """Goes on with these episodes only, by their place in the batch; the others have ended."""
        ...


class Learner(Protocol):
    """Owns a model and its optimizer."""

    model: Any  # an nn.Module with `predict_last_action`
    step: int  # updates made
    spec: SpaceSpec
    normalizer: Normalizer

    def update(self, batch: WindowBatch, *, num_real: Float[Tensor, ""] | None = None) -> Metrics:
        """One gradient step. Metrics stay on the device, so that nothing waits for them."""
        ...

    def evaluate_loss(self, batch: WindowBatch, *, num_real: Float[Tensor, ""] | None = None) -> Metrics:
        """The loss without a gradient step or dropout."""
        ...

    def policy(self) -> Policy:
        """A policy with a copy of the present weights, on the CPU: further updates don't change it."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What resuming needs besides the model's weights: tensors and plain values."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...

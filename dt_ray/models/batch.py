"""A batch of windows as tensors.

Legend: B windows, T window length, S observation, A action dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dt_ray.data.normalizer import Normalizer
from dt_ray.data.windows import Windows


@dataclass(frozen=True, kw_only=True)
class WindowBatch:
    """Windows in the model's units. What stands at padding (mask false) reaches no real step and no loss."""

    observations: Float[Tensor, "B T S"]
    actions: Float[Tensor, "B T A"]
    previous_actions: Float[Tensor, "B T A"]
    returns_to_go: Float[Tensor, "B T"]
    timesteps: Int[Tensor, "B T"]
    mask: Bool[Tensor, "B T"]
    terminated: Bool[Tensor, "B"] | None = None  # the environment ended the episode; only learners of values look
    followed: Bool[Tensor, "B"] | None = None  # a limit cut the episode, and what came next stands behind its last step
    num_real: Float[Tensor, ""] | None = None  # real steps of all workers' shares together, where a source knows them

    def map(self, change: Callable[[Tensor], Tensor]) -> WindowBatch:
        """The batch with each of its tensors changed."""
        return replace(self, **{name: change(tensor) for name, tensor in vars(self).items() if tensor is not None})

    @classmethod
    def from_windows(cls, windows: Windows, normalizer: Normalizer, device: torch.device | str = "cpu") -> WindowBatch:
        """Windows in the environment's units, as `slice_windows` of raw data gives them, in the model's."""
        first = windows.timesteps == 0  # there is no previous action, and none is 0 in the model's units too
        observations, followed = normalizer.normalize_observations(windows.observations), None
        if windows.final_observations is not None:
            finals, lengths = windows.final_observations, windows.mask.sum(axis=1)
            followed = np.isfinite(finals).all(axis=1)
            if windows.terminated is not None:
                followed &= ~windows.terminated
            shown = np.flatnonzero(followed & (lengths < windows.mask.shape[1]))  # behind the last step, as in a table
            observations[shown, lengths[shown]] = normalizer.normalize_observations(finals[shown])
        columns = {
            "observations": observations,
            "actions": normalizer.normalize_actions(windows.actions),
            "previous_actions": normalizer.normalize_actions(windows.previous_actions) * ~first[..., None],
            "returns_to_go": windows.returns_to_go * normalizer.return_scale,
            "timesteps": windows.timesteps,
            "mask": windows.mask,
            "terminated": windows.terminated,
            "followed": followed,
        }
        tensors = {name: torch.as_tensor(each, device=device) for name, each in columns.items() if each is not None}
        tensors["returns_to_go"] = tensors["returns_to_go"].float()
        return cls(**tensors)


def join_batches(parts: Sequence[WindowBatch]) -> WindowBatch:
    """The windows of all parts, of which none knows its number of real steps."""
    first, *others = parts
    if not others:
        return first
    known = [name for name, tensor in vars(first).items() if tensor is not None]
    return WindowBatch(**{name: torch.cat([getattr(part, name) for part in parts]) for name in known})

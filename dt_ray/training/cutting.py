"""Cuts training windows out of a table of windows (`data/windows.py`): a batch is one indexing operation.

Legend: B windows, T window length, W floats of a row, P parts of a table, U updates a draw, G windows of all workers.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple, Protocol

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from torch import Tensor

from dt_ray.data.windows import (
    FOLLOWED,
    TERMINATED,
    UPDATES_A_DRAW,
    WindowTable,
    draw_anchors,
    relabeled_returns,
)
from dt_ray.models.batch import WindowBatch

FLOAT_BYTES = 4
# Windows of a batch in whose steps each worker counts the real ones: more take longer than asking.
MAX_COUNTED_WINDOWS = 4096


class DrawAnchors(Protocol):
    """The anchors of the updates from `draw * UPDATES_A_DRAW` on, a function of (seed, draw)."""

    def __call__(self, *, batch_size: int, seed: int, draw: int) -> Int[ndarray, "U B"]: ...


class WindowLocations(NamedTuple):
    """Where the windows of several batches are in a table."""

    begins: Int[Tensor, "U B"]  # of the rows in front of the anchors, in floats from the cutter's first one on
    timesteps: Int[Tensor, "U B T"]
    mask: Bool[Tensor, "U B T"]
    terminated: Bool[Tensor, "U B"]
    followed: Bool[Tensor, "U B"]
    num_real: Float[Tensor, "U"] | None  # real steps, of all workers' windows together


class WindowCutter:
    """Windows of a table as views of one gathered block, on the device that holds the table."""

    def __init__(
        self,
        table: WindowTable,
        device: torch.device | str,
        *,
        seed: int,
        batch_size: int,
        share: slice,
        draw: DrawAnchors | None = None,
    ) -> None:
        self.table, self.device = table, device
        self.draw_anchors = draw or partial(draw_anchors, table.num_transitions)
        self.seed, self.batch_size, self.share = seed, batch_size, share
        floats, self.part_begins = one_run(table.parts, device)
        size = (table.length + 1) * table.width
        self.blocks = floats.as_strided((len(floats) - size + 1, size), (1, 1))
        self.offsets = torch.arange(table.length, device=device)
        self._draw, self._locations = -1, self.find(np.empty((0, 0), np.int64))

    def batch(self, step: int) -> WindowBatch:
        """This worker's share of batch `step`, a function of (seed, step)."""
        draw, within = divmod(step, UPDATES_A_DRAW)
        if draw != self._draw:
            anchors = self.draw_anchors(batch_size=self.batch_size, seed=self.seed, draw=draw)
            is_large = self.batch_size > MAX_COUNTED_WINDOWS
            found = self.find(anchors[:, self.share]) if is_large else self.find(anchors, share=self.share)
            self._draw, self._locations = draw, found
        return self.cut(self._locations, within)

    def find(self, anchors: Int[ndarray, "U G"], *, share: slice | None = None) -> WindowLocations:
        """What `cut` needs to know of the windows of several batches: of a share of each, if these are all workers'."""
        locations, num_real = self.table.find(anchors), None
        if share is not None:  # every worker draws them all, and need not ask the others how many steps theirs have
            real = np.minimum(locations[2], self.table.length).sum(axis=-1)
            num_real = torch.from_numpy(real.astype(np.float32)).to(self.device)
            locations = locations[:, :, share]
        part_rows = self.table.part_rows
        parts = np.searchsorted(part_rows, locations[0], side="right") - 1
        locations[0] = self.part_begins[parts] + (locations[0] - part_rows[parts]) * self.table.width
        found = torch.from_numpy(np.ascontiguousarray(locations)).to(self.device).unsqueeze(-1)
        begins, timesteps, remaining, endings = found.unbind()
        mask = self.offsets < remaining
        return WindowLocations(
            begins=begins.squeeze(-1),
            timesteps=(timesteps + self.offsets).mul_(mask),
            mask=mask,
            terminated=endings.squeeze(-1) == TERMINATED,
            followed=endings.squeeze(-1) == FOLLOWED,
            num_real=num_real,
        )

    def cut(self, locations: WindowLocations, number: int) -> WindowBatch:
        """The windows of one batch of several; what stands at their padding is no zero but other steps."""
        table = self.table
        block = self.blocks.index_select(0, locations.begins[number]).unflatten(1, (table.length + 1, -1))
        action_end = table.observation_dim + table.action_dim
        actions, returns_to_go = block[:, :, table.observation_dim : action_end], block[:, 1:, action_end]
        if table.relabeled_with is not None:
            newest = locations.mask[number].sum(dim=1, keepdim=True) - 1
            earned = block[:, 1:, -1]
            returns_to_go = relabeled_returns(
                returns_to_go.gather(1, newest),
                earned,
                earned.gather(1, newest),
                (newest - self.offsets).clamp(min=0),
                discount=table.relabeled_with,
            )
        return WindowBatch(
            observations=block[:, 1:, : table.observation_dim],
            actions=actions[:, 1:],
            previous_actions=actions[:, :-1],
            returns_to_go=returns_to_go,
            timesteps=locations.timesteps[number],
            mask=locations.mask[number],
            terminated=locations.terminated[number],
            followed=locations.followed[number],
            num_real=None if locations.num_real is None else locations.num_real[number],
        )


def one_run(parts: Sequence[Float[ndarray, "_ W"]], device: torch.device | str) -> tuple[Tensor, Int[ndarray, "P"]]:
    """One run of floats that all parts lie in, and where each of them begins in it.

    On a CPU nothing is copied: the run spans the memory from the first part to the last one, and what lies between two
    parts is never read. Elsewhere the parts lie behind one another.
    """
    sizes = np.array([part.size for part in parts])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        if torch.device(device).type == "cpu":
            begins = np.array([part.ctypes.data for part in parts]) // FLOAT_BYTES
            first = int(begins.argmin())
            span = int((begins + sizes).max() - begins[first])
            run = np.lib.stride_tricks.as_strided(parts[first].reshape(-1), (span,), (FLOAT_BYTES,), writeable=False)
            return torch.from_numpy(run), begins - begins[first]
        floats = torch.empty(int(sizes.sum()), device=device)
        begins = np.cumsum(sizes) - sizes
        for part, begin in zip(parts, begins.tolist(), strict=True):
            floats[begin : begin + part.size] = torch.from_numpy(part).reshape(-1).to(device)
    return floats, begins

"""The losses, each with the metrics that explain it.

Legend: B windows, T window length, A action dimension.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from dt_ray.models.batch import WindowBatch

Metrics = dict[str, Tensor]  # name -> scalar; each is the mean over ranks of what the ranks return


def decision_transformer_loss(
    predicted: Float[Tensor, "B T A"], windows: WindowBatch, *, num_real: Float[Tensor, ""] | None = None
) -> tuple[Float[Tensor, ""], Metrics]:
    """Mean squared action error over real steps only (Chen et al. 2021, section 3).

    loss = sum over real steps of mean_a (predicted - action)^2, divided by `num_real`: by default the real steps of
    this batch; a data-parallel worker passes the mean count over all workers, so that the mean of the workers' losses,
    and of their gradients, is the mean over the whole global batch.
    """
    real = windows.mask.sum()
    per_step = (predicted - windows.actions).square().mean(dim=-1)  # [B, T]
    squared_error = (per_step * windows.mask).sum()
    absolute_error = ((predicted - windows.actions).detach().abs().mean(dim=-1) * windows.mask).sum()
    divisor = real if num_real is None else num_real
    loss = squared_error / divisor
    return loss, {
        "loss": loss.detach(),
        "action_absolute_error": absolute_error / divisor,
        "mask_fraction": real / windows.mask.numel(),
    }

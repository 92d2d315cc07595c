"""Feeds the windows of a dataset to a training loop that is not dt_ray's, through Ray Data.

    python examples/windows_for_another_trainer.py data/pendulum-mixed

A linear model of the next action, from the observation and the return-to-go at the same step.
"""

import sys

import torch
from torch.nn import functional as F

from dt_ray.config.loading import load_config
from dt_ray.distributed.data import window_dataset


def main(path: str, *, num_epochs: int = 1) -> tuple[float, float]:
    """Trains and returns the mean loss of the first third of the updates and of the last."""
    torch.manual_seed(0)
    windows = window_dataset(load_config("decision_transformer/pendulum", [f"data.path={path}"]))
    model = torch.nn.Linear(3 + 1, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(num_epochs):
        for batch in windows.iter_torch_batches(batch_size=64, local_shuffle_buffer_size=1000, local_shuffle_seed=0):
            features = torch.cat([batch["observations"], batch["returns_to_go"][..., None] / 1000], dim=-1)
            error = F.mse_loss(model(features), batch["actions"], reduction="none").mean(dim=-1)
            loss = (error * batch["mask"]).sum() / batch["mask"].sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    third = max(1, len(losses) // 3)
    return sum(losses[:third]) / third, sum(losses[-third:]) / third


if __name__ == "__main__":
    first, last = main(sys.argv[1])
    print(f"loss {first:.3f} -> {last:.3f}")

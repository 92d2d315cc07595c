"""The losses, each with the metrics that explain it.

Legend: B windows, T window length, A action dimension.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from dt_ray.config.schema import IQLConfig
from dt_ray.models.actor_critic import ActorCriticModel, Transitions
from dt_ray.models.batch import WindowBatch
from dt_ray.models.return_ceiling import QUANTILE
from dt_ray.models.world_model import QUANTILES, WorldModel

MAX_WEIGHT = 100.0  # of an action in the policy's loss, as in the authors' code
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


def ceiling_loss(
    ceilings: Float[Tensor, "B T"], windows: WindowBatch, *, num_real: Float[Tensor, ""] | None = None
) -> Float[Tensor, ""]:
    """Quantile regression of returns-to-go at `QUANTILE`, over real steps (Koenker and Bassett 1978, equation 1.2).

    `num_real` as in `decision_transformer_loss`.
    """
    above = windows.returns_to_go.float() - ceilings
    per_step = torch.maximum(QUANTILE * above, (QUANTILE - 1) * above)  # [B, T]
    return (per_step * windows.mask).sum() / (windows.mask.sum() if num_real is None else num_real)


def expectile_loss(differences: Float[Tensor, "B"], expectile: float) -> Float[Tensor, "B"]:
    """|expectile - 1(u < 0)| u^2 (Kostrikov et al. 2021, equation 4): what is too low weighs `expectile`."""
    weights = torch.where(differences < 0, 1 - expectile, expectile)
    return weights * differences.square()


def iql_losses(
    model: ActorCriticModel,
    batch: Transitions,
    config: IQLConfig,
    *,
    reward_scale: float,
    mean_windows: float | Float[Tensor, ""] | None = None,
) -> dict[str, Float[Tensor, ""]]:
    """The losses of V, of both Q and of the policy (Kostrikov et al. 2021, equations 5 to 7), and their sum `loss`.

    V regresses on the slow Q by an expectile; Q on r + discount V(s'), or on r where the environment ended the episode;
    the policy on logged actions, weighted with exp(temperature (Q - V)), at most `MAX_WEIGHT`. Transitions whose next
    observation is unknown, because a time limit cut the episode, train V and the policy only. Sums over transitions are
    divided by `mean_windows`: by default the transitions of this batch; a data-parallel worker passes the mean count
    over all workers, so that the mean of the workers' losses, and of their gradients, is the mean over the whole global
    batch.
    """
    divisor = len(batch.rewards) if mean_windows is None else mean_windows
    slow = model.target_action_values(batch.observations, batch.actions)
    values = model.values(batch.observations)
    value_loss = expectile_loss(slow - values, config.expectile).sum() / divisor
    with torch.no_grad():
        next_values = model.values(batch.next_observations) * batch.goes_on
        aims = reward_scale * batch.rewards + config.discount * next_values
        advantages = slow - values
        weights = (config.temperature * advantages).exp().clamp(max=MAX_WEIGHT)
    errors = [aims - each for each in model.action_values(batch.observations, batch.actions)]
    critic_loss = sum(
        ((error.square() * batch.is_known).sum() / divisor for error in errors), start=torch.zeros_like(value_loss)
    )
    policy_loss = -(weights * model.log_likelihood(batch.observations, batch.actions)).sum() / divisor
    return {
        "loss": value_loss + critic_loss + policy_loss,
        "value_loss": value_loss,
        "critic_loss": critic_loss,
        "policy_loss": policy_loss,
        "value": values.sum() / divisor,
        "advantage": advantages.sum() / divisor,
    }


def world_model_losses(model: WorldModel, windows: WindowBatch, steps: Transitions) -> dict[str, Float[Tensor, ""]]:
    """The losses of a world model, each a mean over its steps, and their sum `loss`. Members share a batch equally.

    Changes and rewards by the negative logarithm of their likelihood under normal distributions (Chua et al. 2018,
    section 4), ends by cross entropy, quantiles of returns-to-go by quantile regression (Koenker and Bassett 1978).
    What followed a step that a time limit cut is learned where the log has it.
    """
    members = model.num_members
    each = len(steps.rewards) // members

    def shared(values: Tensor) -> Tensor:
        """[B, …] -> [M, B // M, …]"""
        return values[: each * members].unflatten(0, (members, each))

    following = shared(steps.next_observations)
    shown = shared(steps.goes_on) | (following != 0).any(dim=-1) & shared(steps.is_known)
    observations = shared(steps.observations)
    found = model(observations, shared(steps.actions))
    aims = torch.cat(
        [
            (following - observations) / model.change_std,
            ((shared(steps.rewards) - model.reward_mean) / model.reward_std)[..., None],
        ],
        dim=-1,
    )
    means = torch.cat(
        [found.changes / model.change_std, ((found.rewards - model.reward_mean) / model.reward_std)[..., None]], dim=-1
    )
    errors = (means - aims).square()
    # The variance as a weight makes the gradient of the mean that of the squared error (Seitzer et al. 2022, beta 1):
    # without it a step that is hard to foretell is given up, by a large variance.
    weights = (2 * found.log_stds).exp().detach()
    fits = weights * (0.5 * errors * (-2 * found.log_stds).exp() + found.log_stds)
    change_loss = (fits[..., :-1].mean(dim=-1) * shown).sum() / shown.sum().clamp(min=1)
    reward_loss = fits[..., -1].mean()
    ended = shared(steps.is_known & ~steps.goes_on).float()
    end_logits = model.end_logits(following)
    end_losses = torch.nn.functional.binary_cross_entropy_with_logits(end_logits, ended, reduction="none")
    end_loss = (end_losses * shown).sum() / shown.sum().clamp(min=1)
    quantiles = model.return_quantiles(windows.observations[:, 0], windows.timesteps[:, 0])
    above = windows.returns_to_go[:, :1] - quantiles
    levels = torch.tensor(QUANTILES, device=above.device)
    return_loss = torch.maximum(levels * above, (levels - 1) * above).mean()
    return {
        "loss": change_loss + reward_loss + end_loss + return_loss,
        "change_loss": change_loss,
        "reward_loss": reward_loss,
        "end_loss": end_loss,
        "return_loss": return_loss,
        "change_error": ((errors[..., :-1].mean(dim=-1) * shown).sum() / shown.sum().clamp(min=1)).sqrt().detach(),
        "reward_error": errors[..., -1].mean().sqrt().detach(),
    }

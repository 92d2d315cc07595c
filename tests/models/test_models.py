from dataclasses import replace
from functools import partial
from operator import itemgetter

import pytest
import torch
from support.models import make_batch, make_model
from torch import Tensor, nn

from dt_ray.losses import ceiling_loss, decision_transformer_loss
from dt_ray.models import last_step

LAYOUTS = pytest.mark.parametrize("layout", ["step", "triplet", "head"])


@LAYOUTS
def test_padding_cannot_reach_real_steps(layout: str) -> None:
    model, batch = make_model(layout), make_batch()
    noise = torch.randn(batch.mask.shape)
    dirty = replace(
        batch,
        observations=torch.where(batch.mask[..., None], batch.observations, noise[..., None]),
        actions=torch.where(batch.mask[..., None], batch.actions, noise[..., None]),
        previous_actions=torch.where(batch.mask[..., None], batch.previous_actions, noise[..., None]),
        returns_to_go=torch.where(batch.mask, batch.returns_to_go, noise),
    )
    torch.testing.assert_close(model.predict_actions(dirty)[batch.mask], model.predict_actions(batch)[batch.mask])


@LAYOUTS
@pytest.mark.parametrize("step", [0, 2, 5])
def test_a_prediction_sees_the_past_and_not_the_future(layout: str, step: int) -> None:
    model, batch = make_model(layout), make_batch()
    batch = replace(batch, observations=batch.observations.clone().requires_grad_())
    (gradient,) = torch.autograd.grad(model.predict_actions(batch)[:, step].sum(), batch.observations)
    assert gradient[:, : step + 1].abs().sum(dim=(0, 2)).min() > 0
    assert gradient[:, step + 1 :].abs().sum() == 0


@LAYOUTS
def test_an_action_is_never_predicted_from_itself(layout: str) -> None:
    model, batch = make_model(layout), make_batch()
    batch = replace(batch, actions=batch.actions.clone().requires_grad_())
    predicted = model.predict_actions(batch)
    for step in range(6):
        (gradient,) = torch.autograd.grad(predicted[:, step].sum(), batch.actions, retain_graph=True, allow_unused=True)
        assert gradient is None or gradient[:, step:].abs().sum() == 0


def test_the_first_step_of_a_window_sees_the_true_previous_action() -> None:
    model, batch = make_model("step"), make_batch()
    other = replace(batch, previous_actions=batch.previous_actions + 1.0)
    assert (model.predict_actions(batch)[:, 0] - model.predict_actions(other)[:, 0]).abs().min() > 1e-6


def first_steps(row: int, num: int, values: Tensor) -> Tensor:
    """Those of one window; what a window has once is as it is."""
    return values[row : row + 1, :num] if values.ndim > 1 else values[row : row + 1]


@LAYOUTS
def test_the_last_action_is_the_one_at_the_last_real_step(layout: str) -> None:
    model, batch = make_model(layout), make_batch()
    expected = last_step(model.predict_actions(batch), batch.mask)
    torch.testing.assert_close(model.predict_last_action(batch), expected)
    for row in range(len(batch.mask)):
        num = int(batch.mask[row].sum())
        one = batch.map(partial(first_steps, row, num))
        alone = model.predict_last_action(one, padded=False)
        torch.testing.assert_close(alone, expected[row : row + 1], atol=1e-5, rtol=1e-5)


@LAYOUTS
def test_every_parameter_learns(layout: str) -> None:
    model, batch = make_model(layout), make_batch()
    actions, ceilings = model(batch)
    loss, _ = decision_transformer_loss(actions, batch)
    if ceilings is not None:
        loss = loss + ceiling_loss(ceilings, batch)
    loss.backward()
    unused = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert unused == []  # data-parallel training refuses parameters without a gradient


@LAYOUTS
def test_the_blocks_agree_with_torchs_own_transformer(layout: str) -> None:
    """Parity with an independent implementation: `nn.TransformerEncoder` with the same weights."""
    model, batch = make_model(layout), make_batch()
    layer = nn.TransformerEncoderLayer(16, 2, 64, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
    reference = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    for ours, theirs in zip(model.transformer.blocks, reference.layers, strict=True):
        theirs.load_state_dict(
            {
                "self_attn.in_proj_weight": ours.attention.query_key_value.weight,
                "self_attn.in_proj_bias": ours.attention.query_key_value.bias,
                "self_attn.out_proj.weight": ours.attention.project.weight,
                "self_attn.out_proj.bias": ours.attention.project.bias,
                "linear1.weight": ours.mlp[0].weight,
                "linear1.bias": ours.mlp[0].bias,
                "linear2.weight": ours.mlp[2].weight,
                "linear2.bias": ours.mlp[2].bias,
                "norm1.weight": ours.attention_norm.weight,
                "norm1.bias": ours.attention_norm.bias,
                "norm2.weight": ours.mlp_norm.weight,
                "norm2.bias": ours.mlp_norm.bias,
            }
        )
    tokens = model.tokens(batch)
    causal = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
    expected = model.transformer.norm(reference(tokens, mask=causal, is_causal=True))
    torch.testing.assert_close(model.transformer(tokens), expected, atol=1e-5, rtol=1e-5)
    rows = model.tokens.action_rows
    torch.testing.assert_close(model.transformer(tokens, read=rows), expected[:, rows], atol=1e-5, rtol=1e-5)


def test_before_the_head_no_wish_is_looked_at_but_the_steps_own() -> None:
    model, batch = make_model("head"), make_batch()
    batch = replace(batch, returns_to_go=(batch.returns_to_go - 3.0).requires_grad_())  # below every ceiling
    predicted = model.predict_actions(batch)
    for step in range(6):
        (gradient,) = torch.autograd.grad(predicted[:, step].sum(), batch.returns_to_go, retain_graph=True)
        assert gradient[:, step].abs().min() > 0
        assert gradient[:, :step].abs().sum() + gradient[:, step + 1 :].abs().sum() == 0


def test_what_is_out_of_reach_means_as_much_as_can_be_had() -> None:
    model, batch = make_model("head"), make_batch()
    _, ceilings = model(batch)
    assert ceilings is not None
    expected = model.predict_actions(replace(batch, returns_to_go=ceilings))
    for beyond in (0.5, torch.inf):
        wished = replace(batch, returns_to_go=ceilings + beyond)
        torch.testing.assert_close(model.predict_actions(wished), expected)
    less = model.predict_actions(replace(batch, returns_to_go=ceilings - 0.5))
    assert (less - expected).abs().min() > 1e-6


def test_the_ceiling_is_a_high_quantile_of_what_a_state_gives() -> None:
    """Returns-to-go around s for a state s, uniform between s - 1 and s: their 98% quantile is s - 0.02."""
    torch.manual_seed(0)
    model = make_model("head", max_timesteps=1).ceiling
    assert model is not None
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    batch = make_batch()
    for _ in range(1500):
        observations = torch.rand(256, 1, 3) * 2 - 1
        to_go = observations[..., 0] - torch.rand(256, 1)
        real = torch.ones_like(to_go, dtype=torch.bool)
        windows = replace(batch, observations=observations, returns_to_go=to_go, mask=real, timesteps=real.long())
        optimizer.zero_grad()
        ceiling_loss(model(windows.observations, windows.timesteps), windows).backward()
        optimizer.step()
    observations = torch.rand(4000, 1, 3) * 2 - 1
    found = model(observations, torch.ones(4000, 1, dtype=torch.long))
    torch.testing.assert_close(found.mean(), (observations[..., 0] - 0.02).mean(), atol=0.08, rtol=0)
    assert ((observations[..., 0] - torch.rand(4000, 1)) < found).float().mean() > 0.95


def test_triplet_tokens_are_interleaved_as_published() -> None:
    model, batch = make_model("triplet"), make_batch()
    embed = model.tokens
    time = embed.embed_timestep(batch.timesteps[1, 2])
    for offset, expected in enumerate(
        [
            embed.embed_return(batch.returns_to_go[1, 2, None]),
            embed.embed_observation(batch.observations[1, 2]),
            embed.embed_action(batch.actions[1, 2]),
        ]
    ):
        torch.testing.assert_close(embed(batch)[1, 6 + offset], embed.norm(expected + time))


def test_the_loss_divides_by_real_steps_only() -> None:
    batch = make_batch()
    predicted = batch.actions + torch.tensor([1.0, 3.0])
    loss, metrics = decision_transformer_loss(predicted, batch)
    assert loss.item() == pytest.approx(5.0)  # (1 + 9) / 2 at every real step, whatever stands at padding
    assert metrics["loss"].item() == pytest.approx(5.0)
    assert metrics["action_absolute_error"].item() == pytest.approx(2.0)
    assert metrics["mask_fraction"].item() == pytest.approx(batch.mask.float().mean().item())


def test_the_mean_of_worker_losses_is_the_global_loss() -> None:
    batch = make_batch()
    predicted = torch.randn(batch.actions.shape)
    whole, _ = decision_transformer_loss(predicted, batch)
    num_real = batch.mask.sum() / 2
    parts = []
    for rows in (slice(0, 3), slice(3, 6)):
        part = batch.map(itemgetter(rows))
        parts.append(decision_transformer_loss(predicted[rows], part, num_real=num_real)[0])
    torch.testing.assert_close(sum(parts) / 2, whole)

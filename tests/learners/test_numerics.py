"""Every fast path agrees with the plain one: the published formulas in float64, gradients included.

The golden loss curve says that a change which shouldn't touch the mathematics didn't. Where one is meant to:

    PYTHONPATH=tests python tests/learners/test_numerics.py   # writes the golden loss curves anew; say why
"""

import json
import math

import numpy as np
import pytest
import torch
from support.examples import ROOT, make_episodes
from support.models import SPEC, as_float64, make_batch, make_model
from torch import Tensor

from dt_ray.config.schema import DataConfig, ModelConfig, OptimConfig, RunConfig
from dt_ray.learners import LEARNERS
from dt_ray.losses import decision_transformer_loss
from dt_ray.models import WindowBatch
from dt_ray.models.linear import Linear
from dt_ray.models.transformer import Dropout
from dt_ray.training.resident import ResidentData, ResidentSource

LOSS_CURVES = ROOT / "tests/golden" / "loss_curves.json"
KINDS = {
    "step": {"layout": "step"},
    "triplet": {"layout": "triplet"},
    "band": {"layout": "step", "attention": "band", "context_length": 3},
    "relu": {"layout": "step", "activation": "relu"},
}


def plain_actions(weights: dict[str, Tensor], batch: WindowBatch, config: ModelConfig) -> Tensor:
    """The model in float64, token by token and head by head, every row of every block."""

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(x: Tensor, name: str) -> Tensor:
        spread = ((x - x.mean(-1, keepdim=True)) ** 2).mean(-1, keepdim=True)
        centred = (x - x.mean(-1, keepdim=True)) / (spread + 1e-5).sqrt()
        return centred * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def activate(x: Tensor) -> Tensor:
        return x.clamp(min=0) if config.activation == "relu" else x * (1 + torch.erf(x / math.sqrt(2))) / 2

    batch = as_float64(batch)
    time = weights["tokens.embed_timestep.weight"][batch.timesteps]
    if config.token_layout == "step":
        step = torch.cat([batch.returns_to_go[..., None], batch.observations, batch.previous_actions], dim=-1)
        embedded = linear(activate(linear(step, "tokens.embed_step.0")), "tokens.embed_step.2")
        x, first, stride = norm(embedded + time, "tokens.norm"), 0, 1
    else:
        parts = {"return": batch.returns_to_go[..., None], "observation": batch.observations, "action": batch.actions}
        tokens = [linear(value, f"tokens.embed_{name}") + time for name, value in parts.items()]
        interleaved = [token[:, t] for t in range(time.shape[1]) for token in tokens]
        x, first, stride = norm(torch.stack(interleaved, dim=1), "tokens.norm"), 1, 3
    length, head_width = x.shape[1], config.width // config.num_heads
    reach = config.context_length if config.attention == "band" else length
    for layer in range(config.num_layers):
        block = f"transformer.blocks.{layer}"
        attended = norm(x, f"{block}.attention_norm")
        query, key, value = linear(attended, f"{block}.attention.query_key_value").chunk(3, dim=-1)
        rows = []
        for t in range(length):
            seen = slice(max(0, t - reach + 1), t + 1)
            heads = []
            for h in range(config.num_heads):
                part = slice(h * head_width, (h + 1) * head_width)
                scores = (key[:, seen, part] * query[:, t, None, part]).sum(-1) / math.sqrt(head_width)
                heads.append((scores.softmax(-1)[..., None] * value[:, seen, part]).sum(1))
            rows.append(torch.cat(heads, dim=-1))
        x = x + linear(torch.stack(rows, dim=1), f"{block}.attention.project")
        x = x + linear(activate(linear(norm(x, f"{block}.mlp_norm"), f"{block}.mlp.0")), f"{block}.mlp.2")
    return torch.tanh(linear(norm(x, "transformer.norm")[:, first::stride], "predict_action.0"))


@pytest.mark.parametrize("kind", KINDS)
def test_predictions_and_gradients_are_those_of_the_formulas(kind: str) -> None:
    """float32 against float64: actions to 1e-5, each gradient to 1e-4 of its largest entry."""
    model, batch = make_model(**KINDS[kind]), make_batch()
    weights = {name: value.detach().double().requires_grad_() for name, value in model.named_parameters()}
    expected = plain_actions(weights, batch, model.config)
    predicted = model.predict_actions(batch)
    torch.testing.assert_close(predicted.double(), expected, atol=1e-5, rtol=0)
    decision_transformer_loss(expected, as_float64(batch))[0].backward()
    decision_transformer_loss(predicted, batch)[0].backward()
    for name, parameter in model.named_parameters():
        plain = weights[name].grad
        assert parameter.grad is not None
        assert plain is not None
        torch.testing.assert_close(parameter.grad.double(), plain, atol=1e-4 * float(plain.abs().max()), rtol=0)


@pytest.mark.parametrize("num_inputs", [1, 15, 64])
@pytest.mark.parametrize("num_outputs", [1, 128])
@pytest.mark.parametrize("gaps", [False, True])
def test_a_linear_layer_is_its_formula(num_inputs: int, num_outputs: int, gaps: bool) -> None:
    """By whichever library: values and gradients against float64, with and without gaps between rows in memory."""
    generator = torch.Generator().manual_seed(0)
    layer = Linear(num_inputs, num_outputs)
    x = torch.randn(32, 24, num_inputs, generator=generator)[:, :: 2 if gaps else 1].requires_grad_()
    factor = torch.randn(32, 24, num_outputs, generator=generator)[:, :: 2 if gaps else 1]
    (layer(x) * factor).sum().backward()
    plain_x, weight, bias = (value.detach().double().requires_grad_() for value in (x, layer.weight, layer.bias))
    expected = plain_x @ weight.T + bias
    (expected * factor).sum().backward()
    for ours, plain in ((x, plain_x), (layer.weight, weight), (layer.bias, bias)):
        assert ours.grad is not None
        assert plain.grad is not None
        torch.testing.assert_close(ours.grad.double(), plain.grad, atol=1e-4, rtol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(layer(x).double(), expected.detach(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_dropout_keeps_its_share_and_its_mean(rate: float) -> None:
    torch.manual_seed(0)
    x = torch.full((1000, 257), 3.0, requires_grad=True)
    dropped = Dropout(rate).train()(x)
    kept = dropped != 0
    num = x.numel()
    assert abs(kept.sum().item() - (1 - rate) * num) < 5 * math.sqrt(num * rate * (1 - rate))
    for one, other in ((kept[:-1], kept[1:]), (kept[:, :-1], kept[:, 1:])):  # neighbours know nothing of each other
        assert abs((one & other).float().mean().item() - (1 - rate) ** 2) < 5 / math.sqrt(num)
    torch.testing.assert_close(dropped[kept], torch.full_like(dropped[kept], 3 / (1 - rate)), rtol=1e-4, atol=0)
    (gradient,) = torch.autograd.grad(dropped.sum(), x)
    torch.testing.assert_close(gradient, dropped.detach() / 3)
    torch.testing.assert_close(Dropout(rate).eval()(x), x)


def loss_curves() -> dict[str, list[float]]:
    """The losses of 10 updates at seed 0, dropout on, on episodes shorter and longer than a window."""
    torch.set_num_threads(1)
    curves = {}
    for kind, changes in KINDS.items():
        settings = {name: value for name, value in changes.items() if name != "layout"}
        config = RunConfig(
            model=ModelConfig(
                **{"context_length": 6, **settings}, token_layout=changes["layout"], num_layers=2, num_heads=2, width=16
            ),
            optim=OptimConfig(batch_size=16, warmup_steps=2),
            data=DataConfig(return_noise=1.0),
        )
        data = make_episodes([*range(2, 22)], action_dim=SPEC.action_dim)
        source = ResidentSource(ResidentData.build(data, SPEC, config), config)
        learner = LEARNERS[config.algorithm](config, source.spec, source.normalizer)
        curves[kind] = [float(learner.update(source.batch(step))["loss"]) for step in range(10)]
    return curves


def test_the_loss_curve_at_seed_0_is_what_it_was() -> None:
    golden = json.loads(LOSS_CURVES.read_text())
    for kind, losses in loss_curves().items():
        np.testing.assert_allclose(losses, golden[kind], rtol=1e-5, err_msg=kind)


if __name__ == "__main__":
    LOSS_CURVES.write_text(json.dumps(loss_curves(), indent=1) + "\n")

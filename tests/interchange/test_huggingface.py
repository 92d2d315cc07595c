"""Models of `transformers` and ours predict the same actions, either way."""

import json
from pathlib import Path

import pytest
import torch

from dt_ray.config.schema import ModelConfig
from dt_ray.data.spaces import SpaceSpec
from dt_ray.errors import StorageError, UserError
from dt_ray.interchange.huggingface import load, predict, save
from dt_ray.models.decision_transformer import DecisionTransformerModel

transformers = pytest.importorskip("transformers")

SIZES = [
    {"state_dim": 11, "act_dim": 3, "hidden_size": 32, "n_layer": 3, "n_head": 1, "activation_function": "relu"},
    {"state_dim": 3, "act_dim": 1, "hidden_size": 24, "n_layer": 1, "n_head": 4, "activation_function": "gelu"},
    {"state_dim": 17, "act_dim": 6, "hidden_size": 16, "n_layer": 2, "n_head": 2, "activation_function": "gelu_new"},
]


def published(size: dict) -> torch.nn.Module:
    """A model as it is published: every parameter perturbed, so that none that is swapped or left out can hide."""
    torch.manual_seed(0)
    config = transformers.DecisionTransformerConfig(max_ep_len=100, n_positions=64, **size)
    model = transformers.DecisionTransformerModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def windows(size: dict, *, length: int, num: int = 4) -> dict[str, torch.Tensor]:
    """Steps aligned at the right, with more padding in each row, in which anything may stand."""
    torch.manual_seed(1)
    mask = torch.arange(length) >= torch.arange(num)[:, None] % length
    return {
        "observations": torch.randn(num, length, size["state_dim"]),
        "actions": torch.randn(num, length, size["act_dim"]),
        "returns_to_go": torch.randn(num, length, 1),
        "timesteps": torch.randint(0, 100, (num, length)),
        "attention_mask": mask,
    }


def theirs(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(
            states=batch["observations"],
            actions=batch["actions"],
            rewards=None,
            returns_to_go=batch["returns_to_go"],
            timesteps=batch["timesteps"],
            attention_mask=batch["attention_mask"].long(),
        ).action_preds


@pytest.mark.parametrize("length", [1, 5, 20])
@pytest.mark.parametrize("size", SIZES, ids=lambda size: size["activation_function"])
def test_a_published_model_predicts_the_same_actions_as_ours(size: dict, length: int, tmp_path: Path) -> None:
    model = published(size)
    model.save_pretrained(tmp_path)
    batch = windows(size, length=length)
    found = predict(load(tmp_path), **batch)
    real = batch["attention_mask"]
    torch.testing.assert_close(found[real], theirs(model, batch)[real], atol=1e-5, rtol=0)
    assert (found[~real] == 0).all()
    unpadded = {**batch, "attention_mask": torch.ones_like(real)}
    expected = theirs(model, unpadded)
    del unpadded["attention_mask"]
    torch.testing.assert_close(predict(load(tmp_path), **unpadded), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", SIZES, ids=lambda size: size["activation_function"])
def test_ours_loads_in_transformers_and_comes_back(size: dict, tmp_path: Path) -> None:
    activation = {"relu": "relu", "gelu": "gelu", "gelu_new": "gelu_tanh"}[size["activation_function"]]
    config = ModelConfig(
        token_layout="triplet",
        num_layers=size["n_layer"],
        num_heads=size["n_head"],
        width=size["hidden_size"],
        activation=activation,  # type: ignore[arg-type]
        max_timesteps=100,
    )
    num = size["act_dim"]
    spec = SpaceSpec(
        observation_dim=size["state_dim"], action_dim=num, action_low=(-1.0,) * num, action_high=(1.0,) * num
    )
    torch.manual_seed(0)
    model = DecisionTransformerModel(config, spec)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    save(model, tmp_path)
    there, report = transformers.DecisionTransformerModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    batch = windows(size, length=7)
    real = batch["attention_mask"]
    torch.testing.assert_close(predict(model, **batch)[real], theirs(there.eval(), batch)[real], atol=1e-5, rtol=0)
    again = load(tmp_path, context_length=config.context_length)
    assert again.config == config
    for name, value in model.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, msg=name)
    with pytest.raises(UserError, match="holds a model already"):
        save(model, tmp_path)


def test_a_state_dict_of_the_original_repository(tmp_path: Path) -> None:
    """The names of transformers but for `transformer.`, no position table, and the causal mask as buffers."""
    size = SIZES[0]
    model = published(size)
    with torch.no_grad():
        model.encoder.wpe.weight.zero_()  # which the original doesn't have
    state = {
        (f"transformer.{name[8:]}" if name.startswith("encoder.") else name): value
        for name, value in model.state_dict().items()
        if "wpe" not in name
    }
    for layer in range(size["n_layer"]):
        state[f"transformer.h.{layer}.attn.bias"] = torch.ones(1, 1, 64, 64, dtype=torch.uint8).tril()
        state[f"transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    torch.save(state, tmp_path / "model.pt")
    batch = windows(size, length=9)
    real = batch["attention_mask"]
    found = predict(load(tmp_path / "model.pt", num_heads=size["n_head"]), **batch)
    torch.testing.assert_close(found[real], theirs(model, batch)[real], atol=1e-5, rtol=0)


def test_what_ours_can_not_be_is_refused(tmp_path: Path) -> None:
    published(SIZES[1]).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for change, says in (
        ({"action_tanh": False}, "action_tanh=False"),
        ({"activation_function": "silu"}, "activation_function=silu"),
        ({"n_inner": 7}, "n_inner=7"),
        ({"layer_norm_epsilon": 1e-3}, "layer_norm_epsilon=0.001"),
        ({"n_layer": 5}, "no Decision Transformer of this size: encoder.h.1.ln_1.weight"),
        ({"hidden_size": 48}, "not of the sizes"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(UserError, match=says.replace(".", r"\.")):
            load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(StorageError, match="can't read"):
        load(tmp_path)
    with pytest.raises(StorageError, match="can't read"):
        load(tmp_path / "nothing.pt")
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(UserError, match="embed_state.weight is not in it"):
        load(tmp_path / "other.pt")
    step = DecisionTransformerModel(
        ModelConfig(), SpaceSpec(observation_dim=3, action_dim=1, action_low=(-1.0,), action_high=(1.0,))
    )
    with pytest.raises(UserError, match="token_layout=triplet"):
        save(step, tmp_path / "out")

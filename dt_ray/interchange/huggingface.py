"""Decision Transformers of Hugging Face `transformers` and of the original repository, as ours and back.

Both interleave returns, observations and actions: the `triplet` layout. What transformers adds to every token, the
first row of a position table, is folded into the bias of the norm before it.

Weights only: published checkpoints leave their observations' mean and deviation, the scale of returns and the context
length to their model cards.

Legend: B windows, T window length, S observation, A action dimension, D width.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dt_ray.config.schema import ModelConfig
from dt_ray.data.spaces import SpaceSpec
from dt_ray.errors import StorageError, UserError
from dt_ray.models.batch import WindowBatch
from dt_ray.models.decision_transformer import DecisionTransformerModel

ACTIVATIONS = {"relu": "relu", "gelu": "gelu", "gelu_new": "gelu_tanh"}  # theirs to ours
# What our model is; anything else is refused.
FIXED = {
    "action_tanh": True,
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}
DEFAULTS = {"state_dim": 17, "act_dim": 4, "hidden_size": 128, "max_ep_len": 4096, "n_layer": 3, "n_head": 1,
            "n_positions": 1024, "n_inner": None, "activation_function": "relu", "resid_pdrop": 0.1}  # fmt: skip
NAMES = {
    "tokens.embed_return": "embed_return",
    "tokens.embed_observation": "embed_state",
    "tokens.embed_action": "embed_action",
    "tokens.embed_timestep": "embed_timestep",
    "tokens.norm": "embed_ln",
    "transformer.norm": "encoder.ln_f",
    "predict_action.0": "predict_action.0",
}
BLOCK_NAMES = {"attention_norm": "ln_1", "mlp_norm": "ln_2"}
TRANSPOSED = {  # their layers of a block hold [inputs, outputs]
    "attention.query_key_value": "attn.c_attn",
    "attention.project": "attn.c_proj",
    "mlp.0": "mlp.c_fc",
    "mlp.2": "mlp.c_proj",
}
BUFFERS = (".attn.bias", ".attn.masked_bias")  # of the original repository: the causal mask


def load(
    path: str | Path, *, num_heads: int = 1, activation: str = "relu", context_length: int = 20
) -> DecisionTransformerModel:
    """Our model with the weights of a directory of transformers, or of a file of the original repository.

    A state dict by itself doesn't say how many heads and which activation it was trained with, and neither form says
    its context length.

    Raises:
        UserError: it is no Decision Transformer, or of a kind that ours can't be.
        StorageError: the files can't be read.
    """
    place = Path(path)
    if place.is_dir():
        config = DEFAULTS | FIXED | _read_json(place / "config.json")
        weights = _read_weights(next(
            (place / name for name in ("model.safetensors", "pytorch_model.bin") if (place / name).exists()),
            place / "model.safetensors",
        ))  # fmt: skip
    else:
        weights = _read_weights(place)
        config = DEFAULTS | FIXED | {"n_head": num_heads, "activation_function": activation} | _sizes(weights, path)
    weights = {_their_name(name): value for name, value in weights.items() if not name.endswith(BUFFERS)}
    return _from_theirs(config, weights, context_length=context_length, source=str(path))


def save(model: DecisionTransformerModel, directory: str | Path) -> None:
    """Writes `config.json` and `model.safetensors`, which `transformers.DecisionTransformerModel` loads.

    Raises:
        UserError: a model of the step layout, with band attention or with values, which transformers has not; or files
            are there.
    """
    config = model.config
    if config.token_layout != "triplet" or config.attention != "window" or config.clamp_timesteps:
        raise UserError(
            "transformers has models with model.token_layout=triplet, model.attention=window and "
            f"model.clamp_timesteps=false only, got {config.token_layout}, {config.attention}, {config.clamp_timesteps}"
        )
    if config.values is not None:
        raise UserError("transformers has no models with values in them, and this one was trained on returns by value")
    place = Path(directory)
    if (place / "config.json").exists() or (place / "model.safetensors").exists():
        raise UserError(f"{place} holds a model already; choose another directory")
    state, width = model.state_dict(), config.width
    ours = {ours: theirs for ours, (theirs, _) in _name_pairs(config.num_layers).items()}
    transposed = {ours for ours, (_, is_transposed) in _name_pairs(config.num_layers).items() if is_transposed}
    weights = {
        theirs: (state[name].t() if name in transposed else state[name]).contiguous() for name, theirs in ours.items()
    }
    observation_dim, action_dim = weights["embed_state.weight"].shape[1], weights["embed_action.weight"].shape[1]
    unused = {"predict_state": observation_dim, "predict_return": 1}
    weights |= {f"{name}.weight": torch.zeros(num, width) for name, num in unused.items()}
    weights |= {f"{name}.bias": torch.zeros(num) for name, num in unused.items()}
    weights |= {"encoder.wte.weight": torch.zeros(1, width)}
    weights |= {"encoder.wpe.weight": torch.zeros(DEFAULTS["n_positions"], width)}
    described = {
        "architectures": ["DecisionTransformerModel"],
        "model_type": "decision_transformer",
        **DEFAULTS,
        **FIXED,
        "state_dim": observation_dim,
        "act_dim": action_dim,
        "hidden_size": width,
        "max_ep_len": config.max_timesteps,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "activation_function": {ours: theirs for theirs, ours in ACTIVATIONS.items()}[config.activation],
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), config.dropout),
    }
    place.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(weights, place / "model.safetensors", metadata={"format": "pt"})
    (place / "config.json").write_text(json.dumps(described, indent=2) + "\n")


@torch.inference_mode()
def predict(
    model: DecisionTransformerModel,
    *,
    observations: Float[Tensor, "B T S"],
    actions: Float[Tensor, "B T A"],
    returns_to_go: Float[Tensor, "B T"] | Float[Tensor, "B T 1"],
    timesteps: Int[Tensor, "B T"],
    attention_mask: Bool[Tensor, "B T"] | None = None,
) -> Float[Tensor, "B T A"]:
    """The action at every step, as `transformers.DecisionTransformerModel` predicts it, in the units of its weights.

    Steps are aligned at the right, padding before them, where `attention_mask` is 0; what is predicted there is 0.
    """
    model.eval()
    num, length = timesteps.shape
    real = torch.ones_like(timesteps, dtype=torch.bool) if attention_mask is None else attention_mask.to(torch.bool)
    # Ours pads on the right: each row is turned until its first real step is in front, and its actions back again.
    there = (torch.arange(length) + (length - real.sum(dim=1))[:, None]) % length  # [B, T]

    def turn(values: Tensor) -> Tensor:
        return values[torch.arange(num)[:, None], there]

    turned = turn(actions)
    predicted = model.predict_actions(
        WindowBatch(
            observations=turn(observations),
            actions=turned,
            previous_actions=torch.cat([torch.zeros_like(turned[:, :1]), turned[:, :-1]], dim=1),
            returns_to_go=turn(returns_to_go.reshape(num, length)),
            timesteps=turn(timesteps),
            mask=turn(real),
        )
    )
    found = torch.zeros_like(predicted)
    found[torch.arange(num)[:, None], there] = predicted
    return found * real[..., None]


def _from_theirs(
    config: Mapping[str, Any], weights: Mapping[str, Tensor], *, context_length: int, source: str
) -> DecisionTransformerModel:
    problems = [f"{key}={config[key]!r}, ours has {value!r}" for key, value in FIXED.items() if config[key] != value]
    if config["activation_function"] not in ACTIVATIONS:
        problems.append(f"activation_function={config['activation_function']}, ours are {', '.join(ACTIVATIONS)}")
    if config["n_inner"] not in (None, 4 * config["hidden_size"]):
        problems.append(f"n_inner={config['n_inner']}, ours is 4 * hidden_size = {4 * config['hidden_size']}")
    if problems:
        raise UserError(f"{source} can't be loaded: " + "; ".join(problems))
    model_config = ModelConfig(
        context_length=context_length,
        token_layout="triplet",
        num_layers=config["n_layer"],
        num_heads=config["n_head"],
        width=config["hidden_size"],
        activation=ACTIVATIONS[config["activation_function"]],  # type: ignore[arg-type]
        dropout=config["resid_pdrop"],
        max_timesteps=config["max_ep_len"],
    )
    bounds = (1.0,) * config["act_dim"]
    low = tuple(-bound for bound in bounds)
    spec = SpaceSpec(
        observation_dim=config["state_dim"], action_dim=config["act_dim"], action_low=low, action_high=bounds
    )
    model = DecisionTransformerModel(model_config, spec)
    pairs = _name_pairs(model_config.num_layers)
    missing = [theirs for theirs, _ in pairs.values() if theirs not in weights]
    if missing:
        raise UserError(f"{source} is no Decision Transformer of this size: {', '.join(missing[:3])} is not in it")
    state = {
        ours: (weights[theirs].t() if is_transposed else weights[theirs]).float()
        for ours, (theirs, is_transposed) in pairs.items()
    }
    if "encoder.wpe.weight" in weights:  # added to every token right behind this norm
        state["tokens.norm.bias"] = state["tokens.norm.bias"] + weights["encoder.wpe.weight"][0].float()
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(f"{source}: its weights are not of the sizes that its configuration says: {error}") from None
    return model.eval()


def _name_pairs(num_layers: int) -> dict[str, tuple[str, bool]]:
    """Our name of each parameter to theirs, and whether theirs is transposed."""
    pairs = {}
    for ours, theirs in NAMES.items():
        kinds = ("weight",) if ours == "tokens.embed_timestep" else ("weight", "bias")
        pairs |= {f"{ours}.{kind}": (f"{theirs}.{kind}", False) for kind in kinds}
    for layer in range(num_layers):
        for ours, theirs in (BLOCK_NAMES | TRANSPOSED).items():
            for kind in ("weight", "bias"):
                is_transposed = ours in TRANSPOSED and kind == "weight"
                pairs[f"transformer.blocks.{layer}.{ours}.{kind}"] = f"encoder.h.{layer}.{theirs}.{kind}", is_transposed
    return pairs


def _their_name(name: str) -> str:
    """The name that transformers has for a parameter of either."""
    return f"encoder.{name.removeprefix('transformer.')}" if name.startswith("transformer.") else name


def _sizes(weights: Mapping[str, Tensor], source: str | Path) -> dict[str, Any]:
    """The sizes of the model that a state dict is of."""
    try:
        width, observation_dim = weights["embed_state.weight"].shape
        layers = {name.split(".")[2] for name in weights if name.startswith(("transformer.h.", "encoder.h."))}
        return {
            "hidden_size": width,
            "state_dim": observation_dim,
            "act_dim": weights["embed_action.weight"].shape[1],
            "max_ep_len": len(weights["embed_timestep.weight"]),
            "n_layer": len(layers),
        }
    except KeyError as error:
        raise UserError(f"{source} is no Decision Transformer: {error.args[0]} is not in it") from None


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise StorageError(f"can't read {file}: {error}") from None


def _read_weights(file: Path) -> dict[str, Tensor]:
    try:
        if file.suffix == ".safetensors":
            return safetensors.torch.load_file(file)
        loaded = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, safetensors.SafetensorError) as error:
        raise StorageError(f"can't read {file}: {str(error).splitlines()[0]}") from None
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise UserError(f"{file} is no state dict: a dictionary of tensors by name")
    return loaded

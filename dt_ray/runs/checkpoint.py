"""Checkpoints: `policy/` for acting, `training/` for what resuming needs beside it, and a manifest, written last."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from pydantic import TypeAdapter, ValidationError

from dt_ray.config.loading import decode_config, to_plain
from dt_ray.config.modules import check_names
from dt_ray.config.schema import ActionBounds, EvaluationConfig, ModelConfig, OptimConfig, RunConfig
from dt_ray.data.normalizer import Normalizer
from dt_ray.data.spaces import SpaceSpec
from dt_ray.errors import RunError, StorageError
from dt_ray.learners import Learner, Policy, learner_class
from dt_ray.runs.storage import Folder

FORMAT_VERSION = 1
FILES = ("policy/model.safetensors", "policy/policy.json", "training/optimizer.pt", "training/state.json")
MANIFEST = "MANIFEST.json"


@dataclass(frozen=True, kw_only=True)
class PolicyFacts:
    """`policy.json`: all that acting needs besides the weights."""

    format_version: int
    algorithm: str
    step: int
    env_id: str | None
    spec: SpaceSpec
    model: ModelConfig
    normalizer: dict[str, Any]
    evaluation: EvaluationConfig
    env_kwargs: dict[str, Any] = field(default_factory=dict)
    algorithm_settings: dict[str, Any] = field(default_factory=dict)
    action_bounds: ActionBounds = "environment"  # where those of `spec` come from


@dataclass(frozen=True, kw_only=True)
class FileFacts:
    """The size and hash of a file in `MANIFEST.json`."""

    size: int
    sha256: str

    @classmethod
    def of(cls, content: bytes) -> FileFacts:
        return cls(size=len(content), sha256=hashlib.sha256(content).hexdigest())


def checkpoint_name(step: int) -> str:
    return f"step-{step:08d}"


def save_checkpoint(folder: Folder, learner: Learner, *, config: RunConfig) -> None:
    """Writes a checkpoint of a learner as it is now.

    Raises:
        StorageError: the disk is full or can't be written; nothing half-written is left.
    """
    write_checkpoint(folder, pack_checkpoint(learner, config=config, state={}))


def pack_checkpoint(learner: Learner, *, config: RunConfig, state: Mapping[str, Any]) -> dict[str, bytes]:
    """The files of a checkpoint, by name, as copies that further updates don't change; `state` is plain values."""
    facts = PolicyFacts(
        format_version=FORMAT_VERSION,
        algorithm=config.algorithm,
        step=learner.step,
        env_id=config.env_id,
        spec=learner.spec,
        model=config.model,
        normalizer={key: np.asarray(value).tolist() for key, value in asdict(learner.normalizer).items()},
        evaluation=config.evaluation,
        env_kwargs=config.env_kwargs,
        algorithm_settings=config.algorithm_settings,
        action_bounds=config.data.action_bounds,
    )
    weights = {name: value.detach().cpu().contiguous() for name, value in learner.model.state_dict().items()}
    optimizer = io.BytesIO()
    torch.save(learner.state_dict(), optimizer)
    return {
        "policy/model.safetensors": safetensors.torch.save(weights),
        "policy/policy.json": _json(to_plain(facts)),
        "training/optimizer.pt": optimizer.getvalue(),
        "training/state.json": _json({"step": learner.step, "config": to_plain(config), **state}),
    }


def write_checkpoint(folder: Folder, files: Mapping[str, bytes]) -> None:
    """Writes a checkpoint under another name and renames it when it is complete.

    Raises:
        StorageError: the disk is full or can't be written; nothing half-written is left.
    """
    manifest = {name: asdict(FileFacts.of(content)) for name, content in files.items()}
    # Object stores have no renames: there the manifest, written last, is what says that a checkpoint is complete.
    place = folder.parent / f".{folder.name}" if folder.is_local else folder
    try:
        place.delete()
        for name, content in files.items():
            (place / name).write_bytes(content)
        (place / MANIFEST).write_bytes(_json(manifest))
        if folder.is_local:
            folder.delete()
            place.rename(folder)
    except StorageError:
        if folder.is_local:
            place.delete()
        raise


def load_policy(folder: Folder, evaluation: EvaluationConfig | None = None) -> tuple[Policy, PolicyFacts]:
    """The policy of a checkpoint, without its optimizer; `evaluation` may give it a shorter context.

    Raises:
        RunError: the checkpoint is incomplete, damaged or of another format, or names a module that the user did not.
    """
    files = _verified_files(folder, "policy/")
    facts = _facts(folder, files["policy/policy.json"])
    config = RunConfig(
        algorithm=facts.algorithm,
        algorithm_settings=facts.algorithm_settings,
        env_id=facts.env_id,
        model=facts.model,
        evaluation=evaluation or facts.evaluation,
    )
    with _kept_random_state():
        learner = learner_class(facts.algorithm)(config, facts.spec, _normalizer(facts))
        _load_weights(learner, folder, files["policy/model.safetensors"])
        return learner.policy(), facts


def load_learner(folder: Folder, *, optim: OptimConfig | None = None) -> tuple[Learner, RunConfig]:
    """The learner of a checkpoint as it was, on the CPU, and the configuration that it was trained with.

    `optim` replaces its `optim` settings, where this machine lacks something that they need.

    Raises:
        RunError: the checkpoint is incomplete, damaged or of another format.
    """
    facts = read_facts(folder)
    state = json.loads(_verified_files(folder, "training/state.json")["training/state.json"])
    config = decode_config(state["config"])
    check_names(config.named_code, source=f"{folder}/training/state.json")
    config = replace(config, optim=optim or config.optim)
    with _kept_random_state():
        learner = learner_class(facts.algorithm)(config, facts.spec, _normalizer(facts))
        restore_learner(folder, learner)
    return learner, config


def read_facts(folder: Folder) -> PolicyFacts:
    """The facts in a checkpoint's `policy.json`."""
    return _facts(folder, _verified_files(folder, "policy/policy.json")["policy/policy.json"])


def restore_learner(folder: Folder, learner: Learner) -> dict[str, Any]:
    """Loads the weights, the optimizer and the step into `learner`; returns the `state` that was saved with them.

    Raises:
        RunError: the checkpoint is incomplete, damaged or of another model.
    """
    files = _verified_files(folder, "")
    fitted = _facts(folder, files["policy/policy.json"]).normalizer
    if not all(_are_close(value, getattr(learner.normalizer, name)) for name, value in fitted.items()):
        raise RunError(
            f"{folder} was trained on other data than this: its observations, actions or returns were in other units; "
            f"give the same data.path, or start a new run"
        )
    _load_weights(learner, folder, files["policy/model.safetensors"])
    try:
        # On the CPU first, wherever it was saved: the optimizer moves what it takes to the learner's own device.
        state = torch.load(io.BytesIO(files["training/optimizer.pt"]), map_location="cpu", weights_only=True)
        learner.load_state_dict(state)
    except (pickle.UnpicklingError, EOFError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise RunError(f"training/optimizer.pt in {folder} is no optimizer state of this model: {reason}") from None
    return json.loads(files["training/state.json"])


def checkpoint_fault(folder: Folder) -> str | None:
    """Why a checkpoint is not complete: it has no manifest, or a file differs from it. None where it is complete.

    Raises:
        StorageError: the storage doesn't answer.
    """
    try:
        _verified_files(folder, "")
    except RunError as error:
        return str(error)
    return None


def _verified_files(folder: Folder, prefix: str) -> dict[str, bytes]:
    try:
        manifest = TypeAdapter(dict[str, FileFacts]).validate_json((folder / MANIFEST).read_bytes(), strict=True)
    except (FileNotFoundError, ValidationError):
        raise RunError(f"{folder} is no complete checkpoint: it has no readable {MANIFEST}") from None
    files = {}
    for name in FILES:
        if not name.startswith(prefix):
            continue
        try:
            files[name] = (folder / name).read_bytes()
        except FileNotFoundError:
            raise RunError(f"the checkpoint {folder} is damaged: {name} is missing") from None
        if FileFacts.of(files[name]) != manifest.get(name):
            raise RunError(f"the checkpoint {folder} is damaged: {name} is not what {MANIFEST} says")
    return files


@contextmanager
def _kept_random_state() -> Iterator[None]:
    """Restores the random state of the process afterwards: making a learner seeds it."""
    plain, arrays = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(plain)
        np.random.set_state(arrays)


def _facts(folder: Folder, content: bytes) -> PolicyFacts:
    values = json.loads(content)
    if (version := values.get("format_version")) != FORMAT_VERSION:
        raise RunError(
            f"{folder} has checkpoint format {version}; this version of dt_ray reads format {FORMAT_VERSION}"
        )
    try:
        facts = TypeAdapter(PolicyFacts).validate_python(values)
    except ValidationError as error:
        raise RunError(f"{folder}/policy/policy.json does not describe a policy: {error}") from None
    check_names({"algorithm": facts.algorithm, "env_id": facts.env_id}, source=f"{folder}/policy/policy.json")
    return facts


def _normalizer(facts: PolicyFacts) -> Normalizer:
    fitted: dict[str, Any] = {  # in older checkpoints without a discount, whose policies knew of none
        name: np.asarray(value, np.float32) if isinstance(value, list) else value
        for name, value in facts.normalizer.items()
    }
    return Normalizer(**fitted)


def _are_close(one: Any, other: Any) -> bool:
    return np.shape(one) == np.shape(other) and np.allclose(one, other)


def _load_weights(learner: Learner, folder: Folder, content: bytes) -> None:
    try:
        learner.model.load_state_dict(safetensors.torch.load(content))
    except (RuntimeError, safetensors.SafetensorError) as error:
        raise RunError(f"the weights in {folder} are of another model: {error}") from None


def _json(values: Any) -> bytes:
    return (json.dumps(values, indent=2) + "\n").encode()

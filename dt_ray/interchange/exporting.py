"""A policy as one file that acts without dt_ray: ONNX, or a program of torch.export. All units are the environment's.

Legend: N live episodes, T steps of each up to now, S observation, A action dimension.
"""

from __future__ import annotations

import io
import json
import logging
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from torch import Tensor, nn

from dt_ray.data.normalizer import Normalizer
from dt_ray.environments.checked import GymnasiumEnvironments
from dt_ray.environments.steps import Environments, Steps
from dt_ray.errors import UserError
from dt_ray.learners.base import Policy
from dt_ray.learners.iql import ObservationPolicy
from dt_ray.learners.policies import DecisionTransformerPolicy
from dt_ray.models.batch import WindowBatch

INPUTS = ("observations", "previous_actions", "returns_to_go", "timesteps")
TOLERANCE = 1e-5  # of actions, relative to the width of their bounds


class ExportedPolicy(nn.Module):
    """The next actions [N, A], from what happened up to now.

    `observations` [N, T, S]; `previous_actions` [N, T, A], of the step before each, whatever at an episode's first;
    `returns_to_go` [N, T], what was still missing of the target return at each step; `timesteps` [N, T] from 0. T goes
    up to the context length: of longer episodes, the newest steps.
    """

    def __init__(self, policy: DecisionTransformerPolicy) -> None:
        super().__init__()
        self.model, self.return_scale = policy.model, policy.return_scale
        self.units = Units(policy.normalizer)

    def forward(
        self,
        observations: Float[Tensor, "N T S"],
        previous_actions: Float[Tensor, "N T A"],
        returns_to_go: Float[Tensor, "N T"],
        timesteps: Int[Tensor, "N T"],
    ) -> Float[Tensor, "N A"]:
        previous = self.units.normalize_actions(previous_actions) * (timesteps > 0)[..., None]
        predicted = self.model.predict_last_action(
            WindowBatch(
                observations=self.units.normalize_observations(observations),
                actions=previous.roll(-1, dims=1),  # the newest is what is asked for, and is not looked at
                previous_actions=previous,
                returns_to_go=returns_to_go * self.return_scale,
                timesteps=timesteps,
                mask=torch.ones_like(timesteps, dtype=torch.bool),
            ),
            padded=False,
        )
        return self.units.denormalize_actions(predicted)


class ExportedObservationPolicy(nn.Module):
    """The next actions [N, A] from the newest `observations` [N, 1, S] alone."""

    def __init__(self, policy: ObservationPolicy) -> None:
        super().__init__()
        self.model, self.units = policy.model, Units(policy.normalizer)

    def forward(self, observations: Float[Tensor, "N 1 S"]) -> Float[Tensor, "N A"]:
        newest = self.units.normalize_observations(observations[:, -1])
        return self.units.denormalize_actions(self.model.policy_mean(newest))


class Units(nn.Module):
    """A `Normalizer` in torch."""

    mean: Tensor
    std: Tensor
    low: Tensor
    high: Tensor

    def __init__(self, normalizer: Normalizer) -> None:
        super().__init__()
        self.register_buffer("mean", torch.from_numpy(normalizer.observation_mean))
        self.register_buffer("std", torch.from_numpy(normalizer.observation_std))
        self.register_buffer("low", torch.from_numpy(normalizer.action_low))
        self.register_buffer("high", torch.from_numpy(normalizer.action_high))

    def normalize_observations(self, observations: Tensor) -> Tensor:
        return (observations - self.mean) / self.std

    def normalize_actions(self, actions: Tensor) -> Tensor:
        width = self.high - self.low
        scaled = (actions - self.low) / torch.where(width > 0, width, 1.0) * 2 - 1
        return torch.where(width > 0, scaled, 0.0)

    def denormalize_actions(self, actions: Tensor) -> Tensor:
        return (self.low + (actions + 1) / 2 * (self.high - self.low)).clamp(self.low, self.high)


def export_policy(policy: Policy, format: Literal["onnx", "torch"], facts: Mapping[str, Any]) -> bytes:
    """The policy as the content of one file; `facts` go into it as metadata, with the context length.

    Raises:
        UserError: the format needs a package that is not installed.
    """
    if isinstance(policy, ObservationPolicy):
        module, example, dynamic = _observation_policy(policy)
    elif isinstance(policy, DecisionTransformerPolicy):
        module, example, dynamic = _window_policy(policy)
    else:
        raise AssertionError(policy)
    facts = {name: str(value) for name, value in {**facts, "context_length": policy.history_length}.items()}
    with torch.no_grad():
        program = torch.export.export(module.eval(), tuple(example.values()), dynamic_shapes=dynamic)
    content = io.BytesIO()
    if format == "torch":
        torch.export.save(program, content, extra_files={"facts.json": json.dumps(facts)})
        return content.getvalue()
    try:
        import onnxscript  # noqa: F401  # what torch.onnx writes with
    except ImportError:
        raise UserError('--format onnx needs the extra onnx: pip install "dt-ray[onnx]"') from None
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # what is not installed, and not needed
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        written = torch.onnx.export(
            program,
            dynamo=True,
            input_names=list(example),
            output_names=["actions"],
            external_data=False,
            verbose=False,
        )
    assert written is not None
    written.model.metadata_props.update(facts)
    return written.model_proto.SerializeToString()


class DrawnObservations:
    """What takes an environment's place where there is none: independent observations with the data's mean and
    deviation, and rewards of 0."""

    def __init__(self, units: Normalizer) -> None:
        self.units, self.action_shape = units, units.action_low.shape

    def reset(self, seeds: Sequence[int]) -> Float[ndarray, "1 S"]:
        self.generator = np.random.default_rng(seeds[0])
        return self._draw()

    def step(self, live: Int[ndarray, "1"], actions: Float[ndarray, "1 A"]) -> Steps:
        flags = np.zeros(1, dtype=bool)
        return Steps(observations=self._draw(), rewards=np.zeros(1), terminated=flags, truncated=flags)

    def close(self) -> None:
        pass

    def _draw(self) -> Float[ndarray, "1 S"]:
        units = self.units
        return self.generator.normal(units.observation_mean, units.observation_std).astype(np.float32)[None]


def largest_difference(
    act: Any,
    policy: Policy,
    env_id: str | None,
    *,
    target_return: float,
    seed: int,
    max_timesteps: int,
    env_kwargs: Mapping[str, Any] | None = None,
) -> float:
    """Of the actions over one episode that the policy plays: `act` takes the inputs as arrays, by name.

    Relative to the width of the action bounds. Without an environment, observations are drawn like those of the data.

    Raises:
        BrokenEnvironmentError: the environment crashed, or answered what no policy can act on.
    """
    units: Normalizer = policy.normalizer  # type: ignore[attr-defined]
    envs: Environments = DrawnObservations(units) if env_id is None else GymnasiumEnvironments(env_id, 1, env_kwargs)
    try:
        newest = envs.reset([seed])
        policy.start(newest, np.array([target_return]))
        observations, rewards, to_go = [newest[0]], [], [target_return]
        taken = [np.zeros(envs.action_shape, np.float32)]
        largest, context = 0.0, policy.history_length  # type: ignore[attr-defined]
        width = np.asarray(policy.normalizer.action_high) - policy.normalizer.action_low  # type: ignore[attr-defined]
        width = np.where(width > 0, width, 1.0)
        for step in range(max_timesteps):
            action = policy.act()
            inputs = {
                "observations": np.stack(observations[-context:])[None],
                "previous_actions": np.stack(taken[-context:])[None],
                "returns_to_go": np.array([to_go[-context:]], np.float32),
                "timesteps": np.arange(step + 1)[-context:][None],
            }
            largest = max(largest, float((np.abs(act(inputs) - action) / width).max()))
            outcome = envs.step(np.zeros(1, np.int64), action)
            policy.observe(action, outcome.rewards, outcome.observations)
            observations.append(outcome.observations[0])
            rewards.append(float(outcome.rewards[0]))
            taken.append(action[0])
            to_go.append(target_return - sum(rewards))
            if outcome.terminated[0] or outcome.truncated[0]:
                break
    finally:
        envs.close()
    return largest


def load_exported(content: bytes, format: Literal["onnx", "torch"]) -> Any:
    """A function of the inputs by name, as arrays; what an exported file is checked with.

    Raises:
        UserError: the format needs a package that is not installed.
    """
    if format == "torch":
        program = torch.export.load(io.BytesIO(content))
        run, given = program.module(), program.call_spec.in_spec
        assert given is not None
        names = INPUTS[: given.num_leaves]

        def act(inputs: Mapping[str, ndarray]) -> ndarray:
            with torch.no_grad():
                return run(*(torch.from_numpy(inputs[name]) for name in names)).numpy()

        return act
    try:
        import onnxruntime
    except ImportError:
        raise UserError('checking ONNX needs the extra onnx: pip install "dt-ray[onnx]"') from None
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return lambda inputs: session.run(None, {each.name: inputs[each.name] for each in session.get_inputs()})[0]


def _window_policy(policy: DecisionTransformerPolicy) -> tuple[nn.Module, dict[str, Tensor], Any]:
    units, longest = policy.normalizer, policy.history_length
    num, steps = 2, min(3, longest)
    example = {
        "observations": torch.zeros(num, steps, len(units.observation_mean)),
        "previous_actions": torch.zeros(num, steps, len(units.action_low)),
        "returns_to_go": torch.zeros(num, steps),
        "timesteps": torch.arange(steps).expand(num, steps).contiguous(),
    }
    shape: dict[int, Any] = {0: torch.export.Dim("episodes", min=1)}
    if longest > 1:
        shape[1] = torch.export.Dim("steps", min=1, max=longest)
    return ExportedPolicy(policy), example, tuple(shape for _ in example)


def _observation_policy(policy: ObservationPolicy) -> tuple[nn.Module, dict[str, Tensor], Any]:
    example = {"observations": torch.zeros(2, 1, len(policy.normalizer.observation_mean))}
    return ExportedObservationPolicy(policy), example, ({0: torch.export.Dim("episodes", min=1)},)

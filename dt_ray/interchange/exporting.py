"""Exports a policy as one file that acts without dt_ray: ONNX or torch.export. All units are the environment's.

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

from dt_ray.data.normalizer import Normalizer, from_bounds, standardize, to_bounds
from dt_ray.environments.steps import Steps
from dt_ray.errors import UserError
from dt_ray.learners.base import Policy, WindowPolicy, as_window_policy
from dt_ray.learners.iql import ObservationPolicy
from dt_ray.learners.policies import DecisionTransformerPolicy
from dt_ray.models.batch import WindowBatch
from dt_ray.play.rollout import play_in, rollout

INPUTS = ("observations", "previous_actions", "returns_to_go", "timesteps")
TOLERANCE = 1e-5  # of actions, relative to the width of their bounds


class ExportedPolicy(nn.Module):
    """The next actions [N, A], from what happened up to now.

    `observations` [N, T, S]; `previous_actions` [N, T, A], of the step before each, whatever at an episode's first;
    `returns_to_go` [N, T], what was still missing of the target return at each step; `timesteps` [N, T] from 0. T goes
    up to the context length: of longer episodes, the newest steps.

    The first return-to-go is the target; each next one is (the one before - its reward) / discount. With a discount
    below 1, each of them, the first one too, is held between the bounds of its timestep before it is used.
    """

    def __init__(self, policy: WindowPolicy) -> None:
        super().__init__()
        self.model, self.return_scale = policy.model, policy.return_scale
        self.options = {"padded": False} if isinstance(policy, DecisionTransformerPolicy) else {}
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
                actions=previous.roll(-1, dims=1),  # the newest action is the one to predict, and is not used
                previous_actions=previous,
                returns_to_go=returns_to_go * self.return_scale,
                timesteps=timesteps,
                mask=torch.ones_like(timesteps, dtype=torch.bool),
            ),
            **self.options,
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
    """A `Normalizer` as a part of the exported module, which holds its statistics."""

    observation_mean: Tensor
    observation_std: Tensor
    action_low: Tensor
    action_high: Tensor

    def __init__(self, normalizer: Normalizer) -> None:
        super().__init__()
        for name in ("observation_mean", "observation_std", "action_low", "action_high"):
            self.register_buffer(name, torch.from_numpy(getattr(normalizer, name)))

    def normalize_observations(self, observations: Tensor) -> Tensor:
        return standardize(observations, self.observation_mean, self.observation_std)

    def normalize_actions(self, actions: Tensor) -> Tensor:
        return from_bounds(actions, self.action_low, self.action_high)

    def denormalize_actions(self, actions: Tensor) -> Tensor:
        return to_bounds(actions, self.action_low, self.action_high)


def export_policy(policy: Policy, format: Literal["onnx", "torch"], facts: Mapping[str, Any]) -> bytes:
    """The policy as the content of one file; `facts` go into it as metadata, with the context length.

    Where returns-to-go have a discount below 1 it is there too, with `returns_to_go_bounds`, which is JSON: the lowest
    and the highest ones by timestep; later timesteps have those of the last one.

    Raises:
        UserError: the format needs a package that is not installed, or the policy is of a kind that can't be exported.
    """
    windowed = as_window_policy(policy)
    make = _observation_policy if isinstance(policy, ObservationPolicy) else _window_policy
    module, example, dynamic = make(windowed)  # type: ignore[operator]
    told: dict[str, Any] = {"context_length": windowed.history_length}
    if windowed.return_scale and (units := windowed.normalizer).discount < 1.0:
        told |= {"discount": units.discount, "returns_to_go_bounds": json.dumps(units.to_go_bounds.tolist())}
    facts = {name: str(value) for name, value in {**facts, **told}.items()}
    try:
        with torch.no_grad():
            program = torch.export.export(module.eval(), tuple(example.values()), dynamic_shapes=dynamic)
    except Exception as error:
        if isinstance(policy, ObservationPolicy | DecisionTransformerPolicy):
            raise
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"torch.export can't read the model of {type(policy).__qualname__}: {reason}") from error
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
    """Stands in for a missing environment: random observations with the data's mean and deviation, and rewards of 0."""

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
    """The largest difference between the actions of `act` and of the policy over one episode that the policy plays.

    Relative to the width of the action bounds. Without an environment, observations are drawn like those of the data.

    Raises:
        BrokenEnvironmentError: the environment crashed, or answered what no policy can act on.
    """
    units: Normalizer = policy.normalizer  # type: ignore[attr-defined]
    if env_id is None:
        played = play_in(DrawnObservations(units), policy, [seed], [target_return], max_timesteps=max_timesteps)
    else:
        played = rollout(
            policy,
            env_id,
            seeds=[seed],
            target_returns=[target_return],
            max_timesteps=max_timesteps,
            env_kwargs=env_kwargs,
        )
    observations, actions = played.observations[0], played.actions[0]
    previous_actions = np.concatenate([np.zeros_like(actions[:1]), actions[:-1]])
    to_go, timesteps = _returns_to_go(policy, target_return, played.rewards[0]), np.arange(len(actions))
    width = units.action_high - units.action_low
    largest = 0.0
    for step, action in enumerate(actions):
        shown = slice(max(0, step + 1 - policy.history_length), step + 1)  # type: ignore[attr-defined]
        inputs = (values[None, shown] for values in (observations, previous_actions, to_go, timesteps))
        difference = np.abs(act(dict(zip(INPUTS, inputs, strict=True))) - action)
        largest = max(largest, float((difference / np.where(width > 0, width, 1.0)).max()))
    return largest


def _returns_to_go(policy: Any, target_return: float, rewards: Float[ndarray, "T"]) -> Float[ndarray, "T"]:
    """The returns-to-go that the policy sees at each step, in the environment's units."""
    scale = policy.return_scale or 1.0  # counted in the policy's units: dividing makes much of a rounding
    recursion = policy.normalizer.returns_while_acting(scale)
    shown = [recursion.start(np.array([target_return]) * scale)]
    for step, reward in enumerate(rewards[:-1], start=1):
        shown.append(recursion.follow(shown[-1], reward * scale, step))
    return (np.concatenate(shown) / scale).astype(np.float32)


def load_exported(content: bytes, format: Literal["onnx", "torch"]) -> Any:
    """The exported program as a function of its inputs, given as arrays by name.

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


def _window_policy(policy: WindowPolicy) -> tuple[nn.Module, dict[str, Tensor], Any]:
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

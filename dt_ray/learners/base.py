"""The interfaces of learners and policies, the declaration of a learner's needs, and the optimizer steps they share.

Legend: N live episodes, S observation, A action dimension.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from numpy import ndarray
from torch import Tensor, nn

from dt_ray.config.derived import Derived, LogOutline
from dt_ray.config.loading import decode_settings
from dt_ray.config.schema import OptimConfig, PerceptronConfig, RunConfig
from dt_ray.data.normalizer import Normalizer
from dt_ray.data.spaces import SpaceSpec
from dt_ray.errors import ConfigError, UserError
from dt_ray.losses import Metrics
from dt_ray.models.batch import WindowBatch


@dataclass(frozen=True, kw_only=True)
class Declaration:
    """What a learner needs of the data, and which settings it reads. A class without one has these defaults."""

    window_length: int | None = None  # steps of a training window; None: as model.context_length and data.window_length
    returns: Literal["shown", "ignored", "rewards"] = "shown"
    # the model gets returns-to-go; or they are not used; or the learner gets rewards back from their differences
    sections: tuple[str, ...] = ()  # sections of the configuration that only some learners read, such as `iql`
    settings: type[Any] | None = None  # a dataclass of settings of its own, whose values `algorithm_settings` gives
    needs_next_steps: bool = False  # it learns from pairs of steps: a log without any next step is refused
    counts_from_values: bool = False
    # data.return_source=value works: a learner of values is trained first, and its model has `values` by `model.values`
    gives_values: bool = False  # it learns state values: it has `value_function()`
    acts: bool = True  # it has a policy, which is evaluated
    sizes: Callable[[LogOutline], Sequence[Derived]] | None = None  # of its model and training, where they are `auto`

    def conflicts_in(self, config: RunConfig) -> Iterator[str]:
        """One line for each setting that does not go with this learner."""
        name, data = config.algorithm, config.data
        if self.returns == "rewards" and (data.return_source in ("column", "value") or data.return_noise):
            yield f"algorithm: {name} takes rewards from returns-to-go: data.return_source=rewards, data.return_noise=0"
        elif config.relabels and self.returns == "ignored":
            yield f"data.return_source: {name} looks at no returns, got value"
        elif config.relabels and not self.counts_from_values:
            yield f"data.return_source: {name} does not count returns from values, got value"
        if self.returns != "shown" and config.model.conditioning == "head":
            yield f"model.conditioning: {name} is not asked for returns; leave it out"
        if self.counts_from_values and math.inf in config.evaluation.target_returns and not config.takes_max:
            yield (
                "evaluation.target_returns: max needs a model that knows how much a state can give; set "
                "model.conditioning=head, or data.return_source=value"
            )
        if self.window_length is not None and data.window_length is not None:
            steps = "single transitions" if self.window_length == 2 else f"windows of {self.window_length} steps"
            yield f"data.window_length: {name} trains on {steps}, got {data.window_length}"
        yield from self._decode_settings(config)[1]

    def read_settings(self, config: RunConfig) -> Any:
        """The settings of the learner's own: an instance of `settings`, made of `algorithm_settings`.

        Raises:
            ConfigError: unknown names, wrong types and values out of range, all in one message.
        """
        settings, problems = self._decode_settings(config)
        if problems:
            raise ConfigError("\n  ".join([f"{len(problems)} problem(s) in the configuration:", *problems]))
        return settings

    def _decode_settings(self, config: RunConfig) -> tuple[Any, list[str]]:
        given = config.algorithm_settings
        if self.settings is not None:
            return decode_settings(self.settings, given, section="algorithm_settings")
        names = ", ".join(given)
        return None, [f"algorithm_settings: {config.algorithm} has none of its own, got {names}"] if given else []


class ValueFunction(NamedTuple):
    """A learned value of states."""

    network: nn.Sequential  # of observations in the learner's units, by `make_perceptron`
    config: PerceptronConfig
    scale: float  # its outputs are values in the data's units of reward, times this


class Policy(Protocol):
    """Acts in a batch of live episodes that step together."""

    def start(self, observations: Float[ndarray, "N S"], target_returns: Float[ndarray, "N"]) -> None:
        """Begins N new episodes, each with the return that it is asked to reach."""
        ...

    def act(self) -> Float[ndarray, "N A"]:
        """The next action of every live episode, in the environment's units and bounds."""
        ...

    def observe(
        self, actions: Float[ndarray, "N A"], rewards: Float[ndarray, "N"], observations: Float[ndarray, "N S"]
    ) -> None:
        """Tells the policy the action, the reward and the next observation of every live episode."""
        ...

    def keep(self, episodes: Sequence[int] | Int[ndarray, "M"]) -> None:
        """Drops the other episodes, which have ended; these are given by their index in the batch."""
        ...


@runtime_checkable
class WindowPolicy(Policy, Protocol):
    """A policy that acts by its model's `predict_last_action` of the newest steps; it can be exported and served.

    The steps are a `WindowBatch` of up to `history_length` of them, in the normalizer's units. Their returns-to-go are
    those of `normalizer.returns_while_acting(return_scale)`; the newest action is unknown and must not be used.
    """

    model: Any  # an nn.Module with `predict_last_action`
    normalizer: Normalizer
    return_scale: float

    @property
    def history_length(self) -> int: ...


def as_window_policy(policy: Policy) -> WindowPolicy:
    """The same policy.

    Raises:
        UserError: it is no `WindowPolicy`.
    """
    missing = [name for name in ("model", "normalizer", "return_scale", "history_length") if not hasattr(policy, name)]
    if not missing and not hasattr(policy.model, "predict_last_action"):  # type: ignore[attr-defined]
        missing = ["model.predict_last_action"]
    if missing or not isinstance(policy, WindowPolicy):
        raise UserError(
            f"{type(policy).__module__}:{type(policy).__qualname__} can be neither exported nor served: it has no "
            f"{', '.join(missing)}, which dt_ray.learners.base.WindowPolicy describes"
        )
    return policy


class Learner(Protocol):
    """Owns a model and its optimizer; the class may have an attribute `declares`, a `Declaration`."""

    model: Any  # an nn.Module with `predict_last_action`
    spec: SpaceSpec
    normalizer: Normalizer

    @property
    def step(self) -> int:
        """Updates made."""
        ...

    def update(self, batch: WindowBatch, *, num_real: Float[Tensor, ""] | None = None) -> Metrics:
        """One gradient step. Metrics stay on the device, so that nothing waits for them."""
        ...

    def evaluate_loss(self, batch: WindowBatch, *, num_real: Float[Tensor, ""] | None = None) -> Metrics:
        """The loss without a gradient step or dropout."""
        ...

    def policy(self) -> Policy:
        """A policy with a copy of the present weights, on the CPU: further updates don't change it."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What resuming needs beside the model's weights: tensors and plain values."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class GradientSteps:
    """AdamW with the warm-up, schedule and clipping of `optim`, and a count of the steps taken."""

    def __init__(self, model: nn.Module, config: RunConfig) -> None:
        self.model, self.config, self.total = model, config.optim, config.total_timesteps
        self.optimizer = make_optimizer(model, config.optim)
        self.number = 0

    def take(self, loss: Float[Tensor, ""]) -> Metrics:
        """One step down the gradient of a loss; returns the gradient's norm and the learning rate."""
        learning_rate = learning_rate_at(self.number, self.config, total=self.total)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # pyright: ignore[reportUnknownMemberType]
        limit = math.inf if self.config.gradient_clip is None else self.config.gradient_clip
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        self.optimizer.step()  # pyright: ignore[reportUnknownMemberType]
        self.number += 1
        return {"gradient_norm": norm, "learning_rate": torch.tensor(learning_rate)}

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.number, "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.number = state["step"]
        self.optimizer.load_state_dict(state["optimizer"])


def make_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices, not on biases and norms."""
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.95), fused=True)


def learning_rate_at(step: int, config: OptimConfig, *, total: int) -> float:
    """Linear warm-up to `learning_rate`, then constant, or half a cosine that reaches 0 after update `total`."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    progress = (step - config.warmup_steps) / max(1, total - config.warmup_steps)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

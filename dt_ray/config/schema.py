"""Every setting of a run, with its meaning, unit, default and range: one frozen tree.

Plain data, decoded strictly from YAML and `section.key=value` by `config.loading`. The rules that span several fields
are in `config.conflicts`; those of a single learner are its own (`learners.check_settings`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt, Le, Lt

from dt_ray.config.targets import TargetReturn

DEFAULT_CONFIG = "decision_transformer/pendulum"  # what the commands and the Python interface start from
NEUTRAL_CONFIG = "decision_transformer/neutral"  # what they start from where a log or an environment is named
NUM_EVALUATION_SEEDS = 10_000  # environment seeds below this belong to evaluation; collected episodes never use them

# Where policies get their action bounds: the environment, the range of the logged actions, or [lowest, highest].
ActionBounds = Literal["environment", "data"] | tuple[tuple[float, ...], tuple[float, ...]]

# Settings of `data` that the source of batches reads, after the data is laid out, with the values that change nothing.
BATCH_SETTINGS: dict[str, float] = {"return_noise": 0.0, "balance": 0.0}

FUNCTION = re.compile(r"(?!minari:)[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")  # module:function

WINDOW_OVER_BAND = 2  # training windows are so many bands long, so that most of their steps see a full band


def names_function(path: str) -> bool:
    """Whether a dataset's path is `module:function`."""
    return FUNCTION.fullmatch(path) is not None


@dataclass(frozen=True, kw_only=True)
class CollectConfig:
    """The episodes to collect when `data.path` doesn't exist yet."""

    behavior: str  # random | expert | medium | mixed, a run or checkpoint of ours, or module:function
    num_episodes: Annotated[int, Gt(0)] = 600
    seed: Annotated[int, Ge(NUM_EVALUATION_SEEDS)] = 100_000  # episode i resets its environment with seed + i


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    path: str = ""  # a file or folder in a known format, its URI, minari:ID, or module:function, a Ray Dataset's maker
    mix: dict[str, Annotated[float, Gt(0)]] = field(default_factory=dict[str, float])
    # instead of `path`, several datasets: path -> its share of the windows; shares need not add up to 1
    collect: CollectConfig | None = None
    format: str | None = None  # one of `data.logs.files.FORMATS`; null: found out by itself
    residency: Literal["auto", "resident", "streaming", "dataset"] = "auto"  # in memory, streamed from disk, or by size
    # dataset: in Ray's object store, which spills to disk, after Ray Data has read and shuffled it
    memory_mb: Annotated[int, Ge(1)] = 4096  # memory for the decoded data on each node, or for the pools of its workers
    on_corrupt: Literal["stop", "skip"] = "stop"  # at a file that is not usable; skip: leave it out and count it
    out_of_bounds: Literal["stop", "clip"] = "stop"  # at actions outside of the bounds; clip: move them to the bounds
    action_bounds: ActionBounds = "environment"  # of policies; data: the log's range; or [[low …], [high …]]
    columns: dict[str, str | None] = field(default_factory=dict[str, str | None])  # our name -> the log's; null: none
    episodes_across_files: Literal["auto", True, False] = "auto"  # an id in two files is one episode; auto: see docs
    episode_per_file: bool = False  # each file is one episode, where nothing in the log says where one ends
    time_limit: Annotated[int, Ge(1)] | None = None  # episodes of so many steps are truncated, whatever the log says
    action_scale: Annotated[float, Gt(0)] = 1.0  # environment action = logged action * action_scale
    max_episodes: Annotated[int, Ge(1)] | None = None  # use only so many: the first ones by id
    top_fraction: Annotated[float, Gt(0), Le(1)] = 1.0  # of those, use the share with the highest returns
    return_source: Literal["column", "rewards", "value"] | None = None  # of returns-to-go; null: the column, if any
    values: str | None = None  # for `value`: a run or checkpoint of iql, or an iql configuration to train first
    return_scale: Annotated[float, Gt(0)] | None = None  # multiplies returns-to-go; null: 1 / largest |return-to-go|
    return_noise: Annotated[float, Ge(0)] = 0.0  # std of the random error added to each training window's returns-to-go
    balance: Annotated[float, Ge(0), Le(1)] = 0.0  # of windows over returns: 0 as logged, 1 rare ones like others
    discount: Annotated[float, Gt(0), Le(1)] = 1.0  # of rewards in returns-to-go
    validation_fraction: Annotated[float, Ge(0), Lt(1)] = 0.05  # of the episodes, which are not trained on
    window_length: Annotated[int, Ge(1)] | None = None  # steps of a training window; null: the context, 2 under `band`

    @property
    def paths(self) -> tuple[str, ...]:
        """The datasets that are read."""
        return tuple(self.mix) or ((self.path,) if self.path else ())

    @property
    def is_function(self) -> bool:
        """Whether `path` names code that makes a Ray Dataset."""
        return names_function(self.path)

    @property
    def needs_ray(self) -> bool:
        """Whether the data can't be read without Ray."""
        return self.is_function or self.residency == "dataset"


@dataclass(frozen=True, kw_only=True)
class PerceptronConfig:
    num_layers: Annotated[int, Ge(1)]  # hidden ones
    width: Annotated[int, Ge(1)]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    context_length: Annotated[int, Ge(1)] = 20  # steps that the model sees; under `band`, that each layer sees
    attention: Literal["window", "band"] = "window"  # band: what is past is never computed again when acting
    token_layout: Literal["step", "triplet"] = "step"
    conditioning: Literal["tokens", "head"] = "tokens"  # of actions on the wish: in every step's token, or at the end
    num_layers: Annotated[int, Ge(1)] = 3
    num_heads: Annotated[int, Ge(1)] = 1
    width: Annotated[int, Ge(1)] = 128
    activation: Literal["relu", "gelu", "gelu_tanh"] = "gelu"
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.1
    max_timesteps: Annotated[int, Ge(1)] = 1000  # rows of the timestep table: the longest episode it can act in
    clamp_timesteps: bool = False  # steps past the table's end share its last row, in episodes of any length
    values: PerceptronConfig | None = None  # that data.return_source=value puts into the model; not to be set


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    batch_size: Annotated[int, Ge(1)] = 64  # windows per update, over all workers together
    learning_rate: Annotated[float, Gt(0)] = 1e-3
    weight_decay: Annotated[float, Ge(0)] = 1e-4
    warmup_steps: Annotated[int, Ge(0)] = 200  # updates
    schedule: Literal["cosine", "constant"] = "cosine"  # after the warm-up
    gradient_clip: Annotated[float, Gt(0)] | None = 1.0  # largest gradient norm; null: no clipping
    precision: Literal["float32", "tf32", "bfloat16"] = "float32"  # of products; weights and their updates stay float32
    compile: bool = False  # the model's forward and backward pass, by torch.compile


@dataclass(frozen=True, kw_only=True)
class IQLConfig:
    """Implicit Q-learning; its networks have `model.num_layers` hidden layers of `model.width`."""

    expectile: Annotated[float, Gt(0), Lt(1)] = 0.9  # of the actions' values that a state's value is
    temperature: Annotated[float, Ge(0)] = 10.0  # how strongly better actions are preferred
    discount: Annotated[float, Gt(0), Le(1)] = 0.98  # of values; `data.discount` is that of returns-to-go
    target_update: Annotated[float, Gt(0), Le(1)] = 0.005  # how far the slow critics move at each update
    reward_scale: Annotated[float, Gt(0)] = 0.1  # multiplies rewards, and so what the temperature weighs


@dataclass(frozen=True, kw_only=True)
class WorldModelConfig:
    """A world model; its networks of one step have `model.num_layers` hidden layers of `model.width`."""

    num_members: Annotated[int, Ge(2)] = 5  # of the ensemble; each is trained on its share of every batch


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    target_returns: tuple[TargetReturn, ...] = ()  # returns that the policy is asked to reach, numbers or max
    num_episodes: Annotated[int, Ge(1)] = 100  # for each target return
    every: Annotated[int, Ge(0)] = 0  # updates between evaluations; 0: only after the last update
    seed: Annotated[int, Ge(0)] = 0  # episode i resets its environment with seed + i
    max_timesteps: Annotated[int, Ge(1)] = 1000  # an episode is cut after so many steps
    context_length: Annotated[int, Ge(1)] | None = None  # null: the model's
    max_envs: Annotated[int, Ge(1)] = 100  # environments that a run has open at once, collection included
    batched_env: bool = True  # step all episodes as one batch where there is an exact batched copy: Pendulum-v1
    num_actors: Annotated[int, Ge(0)] | None = None  # 0: evaluate in the training process; null: chosen by the cluster
    offline: bool | None = None  # end with estimates from the log alone; null: where there is no environment
    world_model: str | None = None  # a run of world_model for those; null: NAME-world, which is trained when needed
    random_return: float | None = None  # the return with normalized_score 0
    reference_return: float | None = None  # the return with normalized_score 1; null: no score


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    every: Annotated[int, Ge(0)] = 0  # updates between checkpoints; 0: only after the last update
    keep: Annotated[int, Ge(1)] = 3  # newest checkpoints to keep, beside the best one


@dataclass(frozen=True, kw_only=True)
class ScalingConfig:
    num_workers: Annotated[int, Ge(0)] | tuple[Annotated[int, Ge(1)], Annotated[int, Ge(1)]] = 1
    # 0: in this process, without Ray; [min, max]: as many as there is room for, while nodes come and go
    cpus_per_worker: Annotated[float, Gt(0)] | None = None  # null: chosen by the cluster
    use_gpu: bool = False
    accelerator_type: str | None = None  # workers run where there are such GPUs, as Ray names them: H100, L4
    placement_strategy: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"  # of workers over nodes
    wait_for_nodes_s: Annotated[float, Ge(0)] = 0.0  # seconds to wait for an autoscaler or for other users' CPUs
    max_failures: Annotated[int, Ge(0)] = 3  # lost workers that are replaced before the run gives up
    resize_every_s: Annotated[float, Gt(0)] = 60.0  # seconds between two looks for room for more workers

    @property
    def is_elastic(self) -> bool:
        return not isinstance(self.num_workers, int)

    @property
    def min_workers(self) -> int:
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def max_workers(self) -> int:
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    every: Annotated[int, Ge(1)] = 50  # updates between lines of metrics.jsonl
    trackers: tuple[Literal["tensorboard", "mlflow", "wandb"], ...] = ()  # these get the same values


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    __pydantic_config__: ClassVar[dict[str, bool]] = {"coerce_numbers_to_str": True}  # YAML reads name=2024 as a number

    name: str | None = None  # of the run's folder; null: the configuration's name and the time
    env_id: str | None = None  # null: no simulator; a run is evaluated on held-out episodes of its log
    env_kwargs: dict[str, Any] = field(default_factory=dict[str, Any])  # arguments of its constructor, by name
    algorithm: str = "decision_transformer"  # the name of a packaged one, or module:Class for a learner of your own
    algorithm_settings: dict[str, Any] = field(default_factory=dict[str, Any])  # of a learner of your own, by name
    seed: Annotated[int, Ge(0)] = 0
    total_timesteps: Annotated[int, Ge(1)] = 5000  # gradient updates
    storage_path: str = "runs"  # a folder, or a URI that pyarrow's filesystems reach (s3://, gs://)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    iql: IQLConfig = field(default_factory=IQLConfig)
    world_model: WorldModelConfig = field(default_factory=WorldModelConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    scaling: ScalingConfig = field(default_factory=ScalingConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    @property
    def window_length(self) -> int:
        """Steps of a training window, for learners that declare no `window_length`."""
        multiple = WINDOW_OVER_BAND if self.model.attention == "band" else 1
        return self.data.window_length or multiple * self.model.context_length

    @property
    def named_code(self) -> dict[str, str | None]:
        """The settings that may name code, as `module:name`, by their keys."""
        behavior = None if self.data.collect is None else self.data.collect.behavior
        path = self.data.path if self.data.is_function else None
        names = {"algorithm": self.algorithm, "env_id": self.env_id, "data.collect.behavior": behavior}
        return {**names, "data.path": path}

    @property
    def takes_max(self) -> bool:
        """Whether the model learns how much a state can give, so that `max` can be asked for."""
        return self.model.conditioning == "head" or self.relabels

    @property
    def relabels(self) -> bool:
        """Whether learned values take the place of logged returns-to-go."""
        return self.data.return_source == "value"

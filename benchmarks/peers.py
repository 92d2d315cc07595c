"""The public implementations, each used as its own documentation or scripts use it.

Padding, losses and schedules differ among them (docs/performance.md says how); sizes, batch and optimizer are the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from work import (
    ACTION,
    BATCH,
    CONTEXT,
    DROPOUT,
    ENV_ACTION,
    ENV_ID,
    ENV_STATE,
    ENV_STEPS,
    EPISODE_STEPS,
    GRADIENT_CLIP,
    LEARNING_RATE,
    NUM_HEADS,
    NUM_LAYERS,
    STATE,
    TARGET,
    WEIGHT_DECAY,
    WIDTH,
    Episodes,
    Measure,
    rate,
    repeated,
)

MAX_TIMESTEPS = 1000
TORCHRL_KEYS = ["observation", "action", "return_to_go"]


def d3rlpy_algorithm(state: int, action: int, **options: Any) -> Any:
    """With the encoder and the optimizer of d3rlpy's reproduction script; its defaults are no Decision Transformer."""
    import d3rlpy

    encoder = d3rlpy.models.VectorEncoderFactory([WIDTH], exclude_last_activation=True)
    config = d3rlpy.algos.DecisionTransformerConfig(
        batch_size=BATCH,
        context_size=CONTEXT,
        learning_rate=LEARNING_RATE,
        num_heads=NUM_HEADS,
        num_layers=NUM_LAYERS,
        max_timestep=MAX_TIMESTEPS,
        encoder_factory=encoder,
        optim_factory=d3rlpy.optimizers.AdamWFactory(
            weight_decay=WEIGHT_DECAY,
            clip_grad_norm=GRADIENT_CLIP,
            lr_scheduler_factory=d3rlpy.optimizers.WarmupSchedulerFactory(warmup_steps=10_000),
        ),
        **options,
    )
    algorithm = config.create(device="cpu:0")
    algorithm.create_impl((state,), action)
    return algorithm


def d3rlpy_buffer() -> Any:
    import d3rlpy

    data = Episodes.make()
    ends = np.tile(np.arange(EPISODE_STEPS) == EPISODE_STEPS - 1, len(data.rewards)).astype(np.float32)
    return d3rlpy.dataset.MDPDataset(
        observations=data.observations.reshape(-1, STATE),
        actions=data.actions.reshape(-1, ACTION),
        rewards=data.rewards.reshape(-1),
        terminals=np.zeros_like(ends),
        timeouts=ends,
    )


def d3rlpy_update() -> Measure:
    algorithm, batch = d3rlpy_algorithm(STATE, ACTION), d3rlpy_buffer().sample_trajectory_batch(BATCH, length=CONTEXT)
    return repeated(4, lambda: algorithm.update(batch))


def d3rlpy_batches() -> Measure:
    buffer = d3rlpy_buffer()
    return repeated(100, lambda: buffer.sample_trajectory_batch(BATCH, length=CONTEXT))


def d3rlpy_evaluation() -> Measure:
    env = gym.make(ENV_ID)
    player = d3rlpy_algorithm(ENV_STATE, ENV_ACTION).as_stateful_wrapper(target_return=TARGET)

    def play() -> None:
        player.reset()
        observation, reward = env.reset(seed=0)[0], 0.0
        for _ in range(ENV_STEPS):
            observation, reward, *_ = env.step(player.predict(observation, float(reward)))

    return repeated(1, play, each=ENV_STEPS)


def transformers_model(state: int, action: int) -> Any:
    from transformers import DecisionTransformerConfig, DecisionTransformerModel

    config = DecisionTransformerConfig(
        state_dim=state,
        act_dim=action,
        hidden_size=WIDTH,
        max_ep_len=MAX_TIMESTEPS,
        n_layer=NUM_LAYERS,
        n_head=NUM_HEADS,
        n_inner=4 * WIDTH,
        resid_pdrop=DROPOUT,
        embd_pdrop=DROPOUT,
        attn_pdrop=DROPOUT,
        bos_token_id=None,
        eos_token_id=None,
    )
    return DecisionTransformerModel(config)


def transformers_update() -> Measure:
    """The model of transformers, trained as its authors' introduction does: action error over attended steps."""
    model = transformers_model(STATE, ACTION).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    data, rows = Episodes.make(BATCH), slice(0, CONTEXT)
    states, actions, rewards = (
        torch.from_numpy(column[:, rows]) for column in (data.observations, data.actions, data.rewards)
    )
    mask, timesteps = torch.ones(BATCH, CONTEXT), torch.arange(CONTEXT).expand(BATCH, CONTEXT)

    def update() -> None:
        predicted = model(
            states=states,
            actions=actions,
            rewards=rewards[..., None],
            returns_to_go=rewards[..., None],
            timesteps=timesteps,
            attention_mask=mask,
        ).action_preds
        loss = (predicted - actions)[mask > 0].square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), GRADIENT_CLIP)
        optimizer.step()

    return repeated(4, update)


def transformers_evaluation() -> Measure:
    """The evaluation loop of the same introduction: histories that grow, their newest steps padded on the left."""
    model, env = transformers_model(ENV_STATE, ENV_ACTION).eval(), gym.make(ENV_ID)

    def act(states: torch.Tensor, actions: torch.Tensor, to_go: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        padding = CONTEXT - min(CONTEXT, states.shape[0])
        pad = [
            torch.cat([column.new_zeros(padding, *column.shape[1:]), column[-CONTEXT:]])[None]
            for column in (states, actions, to_go, times, torch.ones(states.shape[0]))
        ]
        outputs = model(
            states=pad[0],
            actions=pad[1],
            returns_to_go=pad[2],
            timesteps=pad[3],
            attention_mask=pad[4],
            rewards=None,
        )
        return outputs.action_preds[0, -1]

    @torch.no_grad()
    def play() -> None:
        observation, _ = env.reset(seed=0)
        states = torch.from_numpy(observation)[None]
        actions, times = torch.zeros(0, ENV_ACTION), torch.zeros(1, dtype=torch.long)
        to_go = torch.full((1, 1), TARGET / 1000)
        for step in range(ENV_STEPS):
            actions = torch.cat([actions, torch.zeros(1, ENV_ACTION)])
            actions[-1] = act(states, actions, to_go, times)
            observation, reward, *_ = env.step(actions[-1].numpy())
            states = torch.cat([states, torch.from_numpy(observation)[None]])
            to_go = torch.cat([to_go, to_go[-1:] - float(reward) / 1000])
            times = torch.cat([times, torch.full((1,), step + 1)])

    return repeated(1, play, each=ENV_STEPS)


def torchrl_actor(state: int, action: int, bound: float, keys: list[str]) -> Any:
    from tensordict.nn import TensorDictModule
    from torchrl.modules import DTActor, ProbabilisticActor, TanhDelta

    config = {
        "n_embd": WIDTH,
        "n_layer": NUM_LAYERS,
        "n_head": NUM_HEADS,
        "n_inner": 4 * WIDTH,
        "activation": "relu",
        "n_positions": 1024,
        "resid_pdrop": DROPOUT,
        "attn_pdrop": DROPOUT,
    }
    network = TensorDictModule(
        DTActor(state_dim=state, action_dim=action, transformer_config=config),
        in_keys=keys,
        out_keys=["param"],
    )
    return ProbabilisticActor(
        module=network,
        in_keys=["param"],
        out_keys=["action"],
        distribution_class=TanhDelta,
        distribution_kwargs={"low": torch.full((action,), -bound), "high": torch.full((action,), bound)},
    )


def torchrl_buffer() -> Any:
    """Whole episodes with the columns that its script keeps, cropped to the context and scaled as they are sampled."""
    from tensordict import TensorDict
    from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
    from torchrl.envs.transforms import Compose, DoubleToFloat, RandomCropTensorDict, RewardScaling

    data = Episodes.make()
    shape = data.rewards.shape
    to_go = np.cumsum(data.rewards[:, ::-1], axis=1)[:, ::-1].copy()
    ends = np.broadcast_to(np.arange(shape[1]) == shape[1] - 1, shape)[..., None]
    columns = {
        "observation": data.observations,
        "reward": data.rewards[..., None],
        "return_to_go": to_go[..., None],
        "done": ends,
        "terminated": np.zeros_like(ends),
        "truncated": ends,
    }
    tensors = {name: torch.from_numpy(values.copy()) for name, values in columns.items()}
    episodes = TensorDict(
        {**tensors, "action": torch.from_numpy(data.actions), "next": TensorDict(tensors, shape)}, shape
    )
    scaling = RewardScaling(0.0, 0.001, in_keys=["reward", "return_to_go"], standard_normal=False)
    buffer = TensorDictReplayBuffer(
        storage=LazyTensorStorage(len(episodes)),
        transform=Compose(RandomCropTensorDict(sub_seq_len=CONTEXT, sample_dim=-1), scaling, DoubleToFloat()),
        batch_size=BATCH,
    )
    buffer.extend(episodes)
    return buffer


def torchrl_update() -> Measure:
    from torchrl.objectives import DTLoss

    loss_module = DTLoss(torchrl_actor(STATE, ACTION, 1.0, TORCHRL_KEYS))
    optimizer = torch.optim.Adam(loss_module.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    batch = torchrl_buffer().sample()

    def update() -> None:
        loss = loss_module(batch)["loss"]
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(loss_module.parameters(), GRADIENT_CLIP)
        optimizer.step()

    return repeated(4, update)


def torchrl_batches() -> Measure:
    buffer = torchrl_buffer()
    return repeated(100, buffer.sample)


def torchrl_evaluation(num_envs: int) -> Callable[[], Measure]:
    """Its script's evaluation in `num_envs` environments, in this process: with worker processes it is slower here."""

    def build() -> Measure:
        from torchrl.envs import GymEnv, SerialEnv, TransformedEnv
        from torchrl.envs.transforms import (
            CatFrames,
            Compose,
            DoubleToFloat,
            TargetReturn,
            TensorDictPrimer,
            UnsqueezeTransform,
        )
        from torchrl.envs.utils import ExplorationType, set_exploration_type
        from torchrl.modules import DecisionTransformerInferenceWrapper

        stacked = [f"{name}_cat" for name in TORCHRL_KEYS]
        base = SerialEnv(num_envs, lambda: GymEnv(ENV_ID))
        env = TransformedEnv(
            base,
            Compose(
                TargetReturn(TARGET, out_keys=["return_to_go"]),
                TensorDictPrimer(action=base.action_spec_unbatched, expand_specs=True),
                DoubleToFloat(),
                UnsqueezeTransform(-2, in_keys=TORCHRL_KEYS, out_keys=stacked),
                CatFrames(in_keys=stacked, N=CONTEXT, dim=-2, padding="constant"),
            ),
        )
        policy = DecisionTransformerInferenceWrapper(
            torchrl_actor(ENV_STATE, ENV_ACTION, 2.0, stacked), inference_context=CONTEXT
        )
        policy.set_tensor_keys(**dict(zip(TORCHRL_KEYS, stacked, strict=True)))

        def measure() -> float:
            with set_exploration_type(ExplorationType.DETERMINISTIC), torch.no_grad():
                return rate(num_envs * ENV_STEPS, lambda: env.rollout(ENV_STEPS, policy.eval()))

        with set_exploration_type(ExplorationType.DETERMINISTIC), torch.no_grad():
            env.rollout(5, policy)
        return measure

    return build


D3RLPY = {
    "update": d3rlpy_update,
    "batches": d3rlpy_batches,
    "evaluation, one environment": d3rlpy_evaluation,
}
TRANSFORMERS = {"update": transformers_update, "evaluation, one environment": transformers_evaluation}
TORCHRL = {
    "update": torchrl_update,
    "batches": torchrl_batches,
    "evaluation, one environment": torchrl_evaluation(1),
    "evaluation, 10 environments": torchrl_evaluation(10),
    "evaluation, 100 environments": torchrl_evaluation(100),
}

"""Trained policies of every layout."""

from dataclasses import replace

from dt_ray.config.schema import ModelConfig, RunConfig
from dt_ray.jobs.training import start_run

MODELS = {
    "step": ModelConfig(context_length=4, num_layers=2, width=16, num_heads=2, max_timesteps=60),
    "triplet": ModelConfig(context_length=3, num_layers=1, width=16, token_layout="triplet", max_timesteps=60),
    "band": ModelConfig(context_length=4, num_layers=2, width=16, attention="band", max_timesteps=60),
    "head": ModelConfig(context_length=4, num_layers=2, width=16, conditioning="head", max_timesteps=60),
    "one step": ModelConfig(context_length=1, num_layers=1, width=16, max_timesteps=60),
    "clamped": ModelConfig(context_length=4, num_layers=1, width=16, max_timesteps=9, clamp_timesteps=True),
}


def trained(tiny_config: RunConfig, model: ModelConfig, algorithm: str = "decision_transformer") -> str:
    config = replace(tiny_config, model=model, algorithm=algorithm, total_timesteps=4)
    if model.clamp_timesteps:
        config = replace(config, evaluation=replace(config.evaluation, max_timesteps=20))
    return start_run(config).run

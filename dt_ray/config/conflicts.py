"""The rules between settings of a run that span several fields."""

from __future__ import annotations

from collections.abc import Iterator

from dt_ray.config.schema import NUM_EVALUATION_SEEDS, RunConfig, names_function


def conflicts_in(config: RunConfig) -> Iterator[str]:
    """One line for each rule between fields that the configuration breaks."""
    yield from _data_conflicts(config)
    yield from _value_conflicts(config)
    yield from _environment_conflicts(config)
    model, evaluation = config.model, config.evaluation
    if model.width % model.num_heads:
        yield f"model.num_heads: must divide model.width={model.width}, got {model.num_heads}"
    if model.attention == "band" and model.token_layout != "step":
        yield f"model.attention: band needs model.token_layout=step, got {model.token_layout}"
    if model.conditioning == "head" and model.token_layout != "step":
        yield f"model.conditioning: head needs model.token_layout=step, got {model.token_layout}"
    if (length := config.data.window_length) is not None:
        if model.attention == "window" and length != model.context_length:
            yield (
                f"data.window_length: under model.attention=window a training window is model.context_length="
                f"{model.context_length} steps, got {length}; set model.attention=band, or leave it null"
            )
        elif length < model.context_length:
            yield (
                f"data.window_length: must be at least model.context_length={model.context_length}, so that some steps "
                f"see a full band, got {length}"
            )
    if (context := evaluation.context_length) and context > model.context_length:
        yield (
            f"evaluation.context_length: the model was given model.context_length={model.context_length} steps "
            f"and can't see more, got {context}"
        )
    if evaluation.max_timesteps > model.max_timesteps and not model.clamp_timesteps:
        yield (
            f"evaluation.max_timesteps: the timestep table has model.max_timesteps={model.max_timesteps} rows, "
            f"got {evaluation.max_timesteps}; raise model.max_timesteps or shorten the episodes"
        )
    if (last := evaluation.seed + evaluation.num_episodes) > NUM_EVALUATION_SEEDS:
        yield (
            f"evaluation.seed: evaluation may use the seeds 0..{NUM_EVALUATION_SEEDS - 1}, "
            f"got seed + num_episodes = {last}"
        )
    if (evaluation.random_return is None) != (evaluation.reference_return is None):
        yield "evaluation.random_return: set it together with evaluation.reference_return, or neither"
    elif evaluation.random_return is not None and evaluation.random_return == evaluation.reference_return:
        yield f"evaluation.reference_return: must differ from random_return, got {evaluation.reference_return} for both"
    if config.scaling.accelerator_type is not None and not config.scaling.use_gpu:
        yield f"scaling.accelerator_type: set scaling.use_gpu=true with it, got {config.scaling.accelerator_type}"
    if config.optim.precision == "tf32" and not config.scaling.use_gpu:
        yield "optim.precision: tf32 is a format of GPUs, and scaling.use_gpu is not set"
    if config.scaling.min_workers > config.scaling.max_workers:
        yield f"scaling.num_workers: [min, max], got [{config.scaling.min_workers}, {config.scaling.max_workers}]"
    if config.scaling.max_workers > config.optim.batch_size:
        yield f"scaling.num_workers: at most one per window of optim.batch_size={config.optim.batch_size}"
    if config.name is not None and (not config.name.strip() or "/" in config.name or config.name.startswith(".")):
        yield f"name: the name of a folder, without '/' and not starting with '.', got {config.name!r}"


def _data_conflicts(config: RunConfig) -> Iterator[str]:
    data = config.data
    if data.mix and data.residency == "streaming":
        yield "data.mix: streamed data is not drawn by shares; set data.residency=resident or dataset, got streaming"
    if data.episode_per_file and data.episodes_across_files is True:
        yield "data.episode_per_file: a file is an episode, and data.episodes_across_files=true joins files: give one"
    if data.mix and data.balance:
        yield f"data.balance: the windows of data.mix are drawn by its shares, got {data.balance}"
    if functions := [path for path in data.mix if names_function(path)]:
        yield f"data.mix: files are mixed, got the function {functions[0]}; let one function join what is to be mixed"
    if data.is_function and data.residency == "streaming":
        yield f"data.residency: workers stream files, and {data.path} makes a Ray Dataset; set dataset, got streaming"
    if data.is_function and (files := [name for name in ("format", "collect") if getattr(data, name) is not None]):
        yield f"data.{files[0]}: it is about files, and data.path={data.path} makes a Ray Dataset; leave it out"
    if data.is_function and data.episode_per_file:
        yield f"data.episode_per_file: {data.path} makes a Ray Dataset, which has no files; leave it out"
    if data.needs_ray and config.scaling.num_workers == 0:
        what = f"data.path={data.path} makes a Ray Dataset" if data.is_function else "data.residency=dataset is Ray's"
        yield f"scaling.num_workers: {what}, and 0 trains without Ray; set 1 or more"


def _environment_conflicts(config: RunConfig) -> Iterator[str]:
    if config.env_id is None:
        if config.data.collect is not None:
            yield "data.collect: episodes are collected in an environment; set env_id=ID, or data.collect=null"
        if config.env_kwargs:
            yield f"env_kwargs: they are arguments of an environment; set env_id=ID, got {config.env_kwargs}"
    elif not config.evaluation.target_returns:
        yield f"evaluation.target_returns: what a policy is asked for in {config.env_id}; give at least one, or auto"


def _value_conflicts(config: RunConfig) -> Iterator[str]:
    data = config.data
    if not config.relabels:
        if data.values is not None:
            yield f"data.values: only data.return_source=value looks at it, got {data.values!r}"
        return
    if data.values is None:
        yield "data.return_source: value needs data.values, a run of iql or a configuration like iql/pendulum_values"
    if data.residency == "streaming":
        yield "data.return_source: value relabels data that is resident or a dataset, got data.residency=streaming"
    if data.residency == "dataset" and data.discount < 1:
        yield f"data.discount: with data.residency=dataset learned values are relabelled at 1, got {data.discount}"

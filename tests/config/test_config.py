import math
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from support.examples import ROOT

from dt_ray.config.loading import PACKAGED, check_config, decode_config, load_config, packaged_names, to_yaml
from dt_ray.config.schema import ModelConfig, RunConfig
from dt_ray.errors import ConfigError


@pytest.mark.parametrize("name", [name for name in packaged_names() if not name.endswith("/neutral")])
def test_every_packaged_configuration_loads_and_survives_a_round_trip(name: str) -> None:
    config = load_config(name)
    assert decode_config(yaml.safe_load(to_yaml(config))) == config
    assert (PACKAGED / f"{name}.yaml").read_text().splitlines()[1].startswith("#   python -m dt_ray.")


def test_configs_at_the_top_are_the_packaged_ones() -> None:
    assert (ROOT / "configs").resolve() == PACKAGED.resolve()


def test_every_problem_is_reported_at_once() -> None:
    overrides = ["model.width=abc", "optim.learning_rat=3", "totl_timesteps=3", "evaluation.num_episodes=0", "seed"]
    with pytest.raises(ConfigError) as error:
        load_config("decision_transformer/pendulum", overrides)
    message = str(error.value)
    assert message.startswith("5 problem(s) in the configuration:")
    assert "model.width: Input should be a valid integer, unable to parse string as an integer, got 'abc'" in message
    assert "optim.learning_rat: no such key; did you mean optim.learning_rate?" in message
    assert "totl_timesteps: no such key; did you mean total_timesteps?" in message
    assert "evaluation.num_episodes: Input should be greater than or equal to 1, got 0" in message
    assert "seed: an override is section.key=value" in message


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.context_length=0", "model.context_length: Input should be greater than or equal to 1, got 0"),
        ("evaluation.context_length=21", "can't see more, got 21"),
        ("evaluation.max_timesteps=201", "the timestep table has model.max_timesteps=200 rows, got 201"),
        ("model.num_heads=3", "must divide model.width=64, got 3"),
        ("evaluation.seed=9950", "may use the seeds 0..9999, got seed + num_episodes = 10050"),
        ("data.collect.seed=9999", "data.collect.seed: Input should be greater than or equal to 10000"),
        ("model.token_layout=word", "model.token_layout: Input should be 'step' or 'triplet', got 'word'"),
        ("evaluation.target_returns=[]", "evaluation.target_returns"),
        ("name=a/b", "name: the name of a folder"),
        ("optim.precision=tf32", "tf32 is a format of GPUs"),
        ("scaling.accelerator_type=H100", "set scaling.use_gpu=true with it"),
        ("model=3", "model: Input should be a dictionary"),
        ("optim.learning_rate=.nan", "optim.learning_rate"),
        ("evaluation.reference_return=null", "set it together with evaluation.reference_return"),
    ],
)
def test_impossible_settings_are_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config("decision_transformer/pendulum", [override])
    assert message in str(error.value)


def test_as_much_as_possible_is_a_target_return() -> None:
    overrides = ["evaluation.target_returns=[max, -130]", "model.conditioning=head", "data.return_noise=0"]
    config = load_config("decision_transformer/pendulum", overrides)
    assert config.evaluation.target_returns == (math.inf, -130.0)
    assert "- max" in to_yaml(config)
    assert decode_config(yaml.safe_load(to_yaml(config))) == config


@pytest.mark.parametrize("target", [".nan", "-.inf", "most"])
def test_what_is_no_target_return_is_refused(target: str) -> None:
    with pytest.raises(ConfigError, match=r"evaluation.target_returns.0: .*got"):
        load_config("decision_transformer/pendulum", [f"evaluation.target_returns=[{target}]"])


def test_numbers_in_scientific_notation_are_numbers() -> None:
    assert load_config("decision_transformer/pendulum", ["optim.learning_rate=3e-4"]).optim.learning_rate == 3e-4


def test_overrides_replace_sections_and_make_missing_ones(tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text("total_timesteps: 7\ndata: {path: here, collect: null}\n")
    environment = ["env_id=Pendulum-v1", "evaluation.target_returns=[-200]"]
    config = load_config(str(file), [*environment, "data.collect.behavior=random", "model={width: 8}", "name=2024"])
    assert (config.total_timesteps, config.data.path, config.model.width, config.name) == (7, "here", 8, "2024")
    assert config.data.collect is not None
    assert config.data.collect.behavior == "random"


def test_an_unknown_configuration_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"no configuration 'decision_transformer/pendulm'.*did you mean"):
        load_config("decision_transformer/pendulm")


def test_a_file_that_is_no_yaml_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("a: [1, 2")
    with pytest.raises(ConfigError, match=r"bad.yaml is not YAML"):
        load_config(str(tmp_path / "bad.yaml"))
    (tmp_path / "bad.yaml").write_text("- 1\n")
    with pytest.raises(ConfigError, match="expected `key: value` lines"):
        load_config(str(tmp_path / "bad.yaml"))


def test_a_configuration_made_in_python_is_checked_as_strictly() -> None:
    with pytest.raises(ConfigError, match=r"model.width: Input should be greater than or equal to 1, got -1"):
        check_config(replace(RunConfig(), model=ModelConfig(width=-1)))

"""What is derived from facts of a log and an environment, on facts of our own."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dt_ray.config.derived import KEYS, EnvironmentFacts, LogOutline, beyond_the_log, derive, undecided_keys
from dt_ray.config.loading import decode_config, load_config, read_settings
from dt_ray.config.schema import DEFAULT_CONFIG, RunConfig
from dt_ray.environments import pendulum
from dt_ray.environments.reference_returns import reference_returns
from dt_ray.errors import ConfigError

BOUNDS = {"action_low": (-1.0, 0.0), "action_high": (3.0, 9.0)}
TANK = EnvironmentFacts(env_id="Tank-v0", time_limit=70, has_bounds=True, **BOUNDS)


def outline(lengths: list[int], returns: list[float], **facts: object) -> LogOutline:
    low, high = np.array([-1.0, 5.0]), np.array([3.0, 5.0])
    limits = {"is_low_a_limit": np.array([False, False]), "is_high_a_limit": np.array([False, False])}
    return LogOutline(
        observation_dim=3,
        action_low=low,
        action_high=high,
        lengths=np.array(lengths),
        returns=np.array(returns, float),
        largest_to_go=float(np.abs(returns).max()),
        may_be_choices=False,
        may_be_one_hot=False,
        **{**limits, **facts},
    )


def values(log: LogOutline, environment: EnvironmentFacts | None, **given: object) -> dict[str, object]:
    return {each.key: each.value for each in derive(KEYS, log, environment, given=RunConfig(**given))}


@settings(max_examples=50)
@given(
    episodes=st.lists(st.tuples(st.integers(1, 500), st.floats(-1e4, 1e4)), min_size=1, max_size=30),
    limit=st.one_of(st.none(), st.integers(1, 2000)),
    has_environment=st.booleans(),
)
def test_what_is_derived_is_a_configuration_that_can_be_run(
    episodes: list[tuple[int, float]], limit: int | None, has_environment: bool
) -> None:
    log = outline([length for length, _ in episodes], [value for _, value in episodes])
    environment = replace(TANK, time_limit=limit) if has_environment else None
    found = derive(KEYS, log, environment, given=RunConfig())
    tree = {"env_id": environment and environment.env_id, "data": {"path": "x"}}
    for each in found:
        assert each.why
        section, _, name = each.key.rpartition(".")
        (tree.setdefault(section, {}) if section else tree)[name] = each.value
    config = decode_config(tree)
    assert undecided_keys(tree) == []
    rounding = 1e-3 * np.abs(log.returns).max()
    assert all(log.returns.min() - rounding <= target <= log.returns.max() + rounding
               for target in config.evaluation.target_returns)  # fmt: skip
    assert config.model.max_timesteps >= max(log.longest, config.evaluation.max_timesteps)
    assert (config.evaluation.max_timesteps == limit) if has_environment and limit else True


def test_targets_count_an_episode_by_its_steps() -> None:
    log = outline([1] * 90 + [100] * 9 + [100], [0.0] * 90 + [50.0] * 9 + [80.0])
    assert values(log, TANK)["evaluation.target_returns"] == [80.0, 50.0]


def test_bounds_are_the_environments_else_the_logs_with_a_margin_but_for_limits() -> None:
    limits = {"is_low_a_limit": np.array([True, False]), "is_high_a_limit": np.array([False, False])}
    log = outline([10, 10], [1.0, 2.0], **limits)
    assert values(log, TANK)["data.action_bounds"] == "environment"
    assert values(log, None)["data.action_bounds"] == [[-1.0, 5.0], [3.2, 5.0]]
    half = {"action_low": (-np.inf, -np.inf), "action_high": (3.0, np.inf)}
    half_bounded = EnvironmentFacts(env_id="Tank-v0", time_limit=70, has_bounds=False, **half)
    assert values(log, half_bounded)["data.action_bounds"] == [[-1.0, 5.0], [3.0, 5.0]]


def test_one_hot_actions_are_refused_and_whole_numbers_doubted_unless_someone_says_otherwise() -> None:
    log = replace(outline([10], [1.0]), may_be_choices=True, action_low=np.zeros(2), action_high=np.ones(2))
    (bounds,) = derive(["data.action_bounds"], log, None, given=RunConfig())
    assert "if they are choices" in bounds.why
    one_hot = replace(log, may_be_one_hot=True)
    with pytest.raises(ConfigError, match=r"a choice among 2; .*'data.action_bounds=\[\[0.0, 0.0\], \[1.0, 1.0\]\]'"):
        derive(KEYS, one_hot, None, given=RunConfig())
    assert values(one_hot, TANK)["data.action_bounds"] == "environment"
    derive([key for key in KEYS if key != "data.action_bounds"], one_hot, None, given=RunConfig())


def test_without_an_environment_at_least_one_episode_is_held_out() -> None:
    for num in (2, 3, 11, 500):
        log = outline([5] * num, [1.0] * num)
        assert round(num * values(log, None)["data.validation_fraction"]) >= 1
    assert values(outline([5], [1.0]), None)["data.validation_fraction"] == 0.0


def test_what_the_user_sets_is_followed_by_what_depends_on_it() -> None:
    log = outline([50], [1.0])
    given = RunConfig(total_timesteps=100)
    found = {each.key: each.value for each in derive({"evaluation.every"}, log, TANK, given=given)}
    assert found == {"evaluation.every": 20}
    config = decode_config({"evaluation": {"max_timesteps": 300}, "model": {"clamp_timesteps": True}})
    (table,) = derive({"model.max_timesteps"}, log, TANK, given=config)
    assert table.value == 300


@settings(max_examples=50)
@given(
    num_steps=st.integers(1, 10**7), context=st.integers(1, 40), windows=st.integers(1, 1000),
)  # fmt: skip
def test_smaller_updates_are_as_many_more_as_the_same_work_allows(num_steps: int, context: int, windows: int) -> None:
    log = outline([num_steps], [1.0])

    def num_updates(keys: set[str], **sections: dict[str, int]) -> int:
        found = derive({"total_timesteps", *keys}, log, TANK, given=decode_config(dict(sections)))
        return next(each.value for each in found if each.key == "total_timesteps")

    usual = num_updates({"model.context_length"})
    assert 1000 <= usual <= 5000
    num = num_updates(set(), model={"context_length": context}, optim={"batch_size": windows})
    assert num >= usual
    assert num == 1000 or num * min(context * windows, 64 * 20) <= 5000 * 64 * 20


def test_targets_beyond_the_log_are_marked() -> None:
    log = outline([5, 5], [-3.0, 8.0])
    assert beyond_the_log([8.0, -3.0], log) is None
    note = beyond_the_log([9.0, 1.0, -4.0], log)
    assert note is not None
    assert note.why == "as given; beyond the data, whose returns are -3 .. 8: 9, -4"


def test_references_are_those_that_were_published() -> None:
    assert reference_returns("Hopper-v4") == reference_returns("Hopper-v5")
    assert [reference_returns(name) for name in ("Hopper", "Swimmer-v5", "mine:Hopper-v5x")] == [None] * 3
    main_job = load_config(DEFAULT_CONFIG).evaluation
    assert (main_job.random_return, main_job.reference_return) == (pendulum.RANDOM_RETURN, pendulum.REFERENCE_RETURN)


@pytest.mark.parametrize("overrides", [["data.path=x"], ["env_id=Hopper-v5"], ["data.mix={a: 1}"], ["data.mix.a=1"]])
def test_a_named_log_or_environment_starts_from_nothing_of_pendulum(overrides: list[str]) -> None:
    tree = read_settings(None, overrides)
    assert "Pendulum" not in str(tree)
    assert {"evaluation.target_returns", "evaluation.max_timesteps", "data.return_scale"} <= set(undecided_keys(tree))


def test_nothing_named_is_the_main_job() -> None:
    change = ["total_timesteps=5"]
    assert decode_config(read_settings(None, change)) == load_config(DEFAULT_CONFIG, change)


def test_a_preset_in_another_environment_is_refused_with_what_to_type() -> None:
    for name in (DEFAULT_CONFIG, "iql/pendulum_random"):
        with pytest.raises(ConfigError, match=r"is for Pendulum-v1: .* -m dt_ray.train env_id=Hopper-v5 data.path"):
            read_settings(name, ["env_id=Hopper-v5"])
        assert read_settings(name, ["env_id=Pendulum-v1"])["env_id"] == "Pendulum-v1"


def test_auto_is_refused_where_nothing_derives_it() -> None:
    with pytest.raises(ConfigError, match=r"model.width: auto is derived from the log when a new run is started"):
        decode_config({"model": {"width": "auto"}})
    with pytest.raises(ConfigError, match=r"optim.batch_size: Input should be a valid integer"):
        decode_config({"optim": {"batch_size": "auto"}})

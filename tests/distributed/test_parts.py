"""A table that tasks write in parts is the one that a single process writes, whatever lies in which block."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from support.examples import make_episodes

from dt_ray.config.schema import RunConfig
from dt_ray.data import blocks
from dt_ray.data.logs.episodes import to_table
from dt_ray.data.spaces import SpaceSpec
from dt_ray.distributed import preparing
from dt_ray.distributed.trials import layout_key
from dt_ray.training.resident import ResidentData, ResidentSource


@pytest.mark.parametrize("return_source", [None, "rewards"])
@pytest.mark.parametrize("order", ["of their ids", "shuffled"])
def test_parts_make_the_table_of_one_process(
    tiny_config: RunConfig,
    pendulum_spec: SpaceSpec,
    monkeypatch: pytest.MonkeyPatch,
    order: str,
    return_source: str | None,
) -> None:
    monkeypatch.setattr(blocks, "CHUNK_STEPS", 40)
    monkeypatch.setattr(preparing, "PART_BYTES", 2_000)
    generator = np.random.default_rng(0)
    data = make_episodes(generator.integers(1, 30, size=60).tolist())
    finals = generator.normal(size=(60, 3)).astype(np.float32)
    finals[::3] = np.nan
    data = replace(data, final_observations=finals)
    if return_source == "rewards":
        data = replace(data, returns_to_go=generator.normal(size=data.num_transitions).astype(np.float32))
    data = data.select(generator.permutation(60)) if order == "shuffled" else data
    config = replace(tiny_config, data=replace(tiny_config.data, return_source=return_source, max_episodes=50))
    tables = [to_table(data.select(range(begin, begin + 12))) for begin in range(0, 60, 12)]
    tables.insert(2, tables[0].slice(0, 0))  # a task may give a block without rows

    head, (parts, _) = preparing._lay_out._function(config, pendulum_spec, 0, *tables)
    assert len(parts) > 3
    written = [preparing._write_part._function(part, *(tables[at] for at in part.blocks)) for part in parts]
    there = replace(head, train=replace(head.train, parts=tuple(written)))
    here = ResidentData.build(data, pendulum_spec, config)
    np.testing.assert_array_equal(there.train.rows, here.train.rows)
    np.testing.assert_array_equal(there.validation.rows, here.validation.rows)
    for name in ("observation_mean", "observation_std", "return_scale"):
        np.testing.assert_array_equal(getattr(there.normalizer, name), getattr(here.normalizer, name))
    for step in (0, 70):
        one, other = (ResidentSource(each, config).batch(step) for each in (there, here))
        for name in ("observations", "actions", "previous_actions", "returns_to_go"):
            assert bool((getattr(one, name)[one.mask] == getattr(other, name)[other.mask]).all()), name
    if order == "of their ids":
        assert max(len(part.blocks) for part in parts) < len(tables) - 1  # a task is given what it needs only


def test_runs_that_share_a_split_share_a_layout(tiny_config: RunConfig) -> None:
    other = replace(tiny_config, seed=7)
    assert layout_key(tiny_config) != layout_key(other)  # other episodes are held out
    one, other = (replace(each, data=replace(each.data, validation_fraction=0.0)) for each in (tiny_config, other))
    assert layout_key(one) == layout_key(other)
    assert layout_key(one) != layout_key(replace(one, algorithm="iql"))

"""Blocks of shuffled episodes give each transition once a pass, mixed by shares, from any update on."""

from dataclasses import replace
from itertools import islice

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.examples import make_episodes

from dt_ray.config.loading import check_config
from dt_ray.config.schema import RunConfig
from dt_ray.data import TransitionDataset, slice_windows
from dt_ray.data.logs.episodes import to_table
from dt_ray.data.spaces import SpaceSpec
from dt_ray.data.transitions import SOURCE_BITS
from dt_ray.errors import ConfigError, DataError
from dt_ray.models.batch import WindowBatch
from dt_ray.training import pools
from dt_ray.training.pools import PoolPlan
from dt_ray.training.resident import ResidentData
from dt_ray.training.sharded import ShardedData, ShardedSource

BATCH, POOL = 7, 60  # windows, transitions


@pytest.fixture
def data() -> TransitionDataset:
    """Episodes in the model's units whose observations say which transition they are."""
    episodes = make_episodes(np.random.default_rng(0).integers(1, 20, size=50).tolist())
    episodes.observations[:, 0] = np.arange(episodes.num_transitions)
    return replace(episodes, returns_to_go=episodes.to_go())


@pytest.fixture
def config(tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    """A configuration whose pools hold 60 transitions."""
    monkeypatch.setattr(pools, "POOL_SHARE", POOL * 4 * 5 / 2**20)
    optim = replace(tiny_config.optim, batch_size=BATCH)
    return replace(tiny_config, data=replace(tiny_config.data, memory_mb=1), optim=optim)


def source_of(
    data: TransitionDataset, config: RunConfig, spec: SpaceSpec, *, num_blocks: int = 9, **place: int
) -> ShardedSource:
    """Blocks of these episodes; the episodes of a mix say in their ids which dataset they are of."""
    tables: list[pa.Table] = []
    sources: list[int] = []
    for source in np.unique(data.episode_ids >> SOURCE_BITS):
        mine = np.flatnonzero(data.episode_ids >> SOURCE_BITS == source)
        tables += [to_table(data.select(mine[at::num_blocks])) for at in range(num_blocks)]
        sources += [int(source)] * num_blocks
    facts = ResidentData.build(data, spec, replace(config, data=replace(config.data, mix={})))
    lengths = [sum(map(len, table["rewards"].to_pylist())) for table in tables]
    built = ShardedData(
        spec=spec,
        normalizer=facts.normalizer,
        lengths=np.array(lengths),
        sources=np.array(sources),
        validation=None,
        values=None,
        num_skipped_files=0,
    )
    built.check(config)
    return ShardedSource(built, config, lambda blocks: [tables[at] for at in blocks], **place)


def anchors_of(batch: WindowBatch) -> list[int]:
    return batch.observations[:, 0, 0].int().tolist()


def assert_equal(one: WindowBatch, other: WindowBatch) -> None:
    for name, tensor in vars(one).items():
        if tensor is not None:
            np.testing.assert_array_equal(tensor[one.mask] if tensor.shape == one.mask.shape else tensor,
                                          getattr(other, name)[one.mask] if tensor.shape == one.mask.shape
                                          else getattr(other, name), err_msg=name)  # fmt: skip


def test_each_transition_is_an_anchor_once_a_pass_and_windows_are_whole(
    data: TransitionDataset, config: RunConfig, pendulum_spec: SpaceSpec
) -> None:
    source = source_of(data, config, pendulum_spec)
    num = data.num_transitions
    seen: list[int] = []
    for step in range(2 * num // BATCH):
        batch = source.batch(step)
        windows = slice_windows(data, np.array(anchors_of(batch)), length=config.window_length)
        np.testing.assert_array_equal(batch.mask, windows.mask)
        for name in ("observations", "actions", "returns_to_go", "timesteps"):
            np.testing.assert_array_equal(getattr(batch, name)[batch.mask], getattr(windows, name)[windows.mask])
        seen += anchors_of(batch)
    assert sorted(seen[:num]) == list(range(num))
    assert sorted(set(seen[num:])) == sorted(seen[num:])
    assert seen[num : num + 100] != seen[:100]


def test_a_source_that_begins_at_any_update_goes_on_with_the_same_batches(
    data: TransitionDataset, config: RunConfig, pendulum_spec: SpaceSpec
) -> None:
    whole = source_of(data, config, pendulum_spec)
    batches = [whole.batch(step) for step in range(200)]
    for first in (1, 8, 9, 77, 130, 199):
        resumed = source_of(data, config, pendulum_spec)
        for step in range(first, min(first + 12, 200)):
            assert_equal(resumed.batch(step), batches[step])


@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=25),
    world_size=st.integers(1, 4),
    capacity=st.integers(1, 80),
    window=st.integers(0, 2000),
)
def test_workers_share_the_blocks_of_a_pass_and_pools_follow_one_another(
    lengths: list[int], world_size: int, capacity: int, window: int
) -> None:
    world_size = min(world_size, len(lengths))
    blocks, sizes = np.arange(len(lengths)) + 100, np.array(lengths)
    first_pass: list[int] = []
    for rank in range(world_size):
        plan = PoolPlan(blocks=blocks, lengths=sizes, capacity=capacity, seed=(0,), rank=rank, world_size=world_size)
        pools = list(islice(plan.pools(), 40))
        begin = 0
        for pool in pools:
            size = int(sizes[pool.blocks - 100].sum())
            assert pool.begin == begin
            assert size <= capacity + 2 * max(lengths)
            begin += size
        number = pools[0].seed[1]
        first_pass += [int(block) for pool in pools if pool.seed[1] == number for block in pool.blocks]
        entered = next(plan.pools(window))
        assert entered.begin <= window < entered.begin + int(sizes[entered.blocks - 100].sum())
    assert sorted(first_pass) == blocks.tolist()


def test_workers_with_unequal_shards_all_have_batches_for_ever(
    data: TransitionDataset, config: RunConfig, pendulum_spec: SpaceSpec
) -> None:
    """Three workers, four blocks, of which one has most of the transitions."""
    uneven = data.select(np.argsort(data.lengths))
    sources = [source_of(uneven, config, pendulum_spec, num_blocks=4, rank=rank, world_size=3) for rank in range(3)]
    for step in range(150):
        batches = [source.batch(step) for source in sources]
        assert sum(len(batch.mask) for batch in batches) == BATCH


def test_a_mix_gives_each_dataset_its_share_and_each_of_its_transitions_once_a_pass(
    data: TransitionDataset, config: RunConfig, pendulum_spec: SpaceSpec
) -> None:
    ids = data.episode_ids + (np.where(np.arange(data.num_episodes) < 35, 0, 1) << SOURCE_BITS)
    mixed = replace(config, data=replace(config.data, path="", mix={"a": 1.0, "b": 3.0}))
    parts = replace(data, episode_ids=ids)
    num_first = int(data.lengths[:35].sum())
    source = source_of(parts, mixed, pendulum_spec)
    seen = [anchors_of(source.batch(step)) for step in range(400)]
    anchors = np.concatenate(seen)
    assert np.mean(anchors >= num_first) == pytest.approx(0.75, abs=0.03)
    for begin, end in ((0, num_first), (num_first, data.num_transitions)):
        mine = anchors[(anchors >= begin) & (anchors < end)]
        assert sorted(mine[: end - begin]) == list(range(begin, end))
    for first in (63, 64, 150, 260):
        resumed = source_of(parts, mixed, pendulum_spec)
        assert [anchors_of(resumed.batch(step)) for step in range(first, first + 70)] == seen[first : first + 70]


def test_balanced_windows_come_from_pools_too(
    data: TransitionDataset, config: RunConfig, pendulum_spec: SpaceSpec
) -> None:
    balanced = replace(config, data=replace(config.data, balance=1.0))
    source, resumed = (source_of(data, balanced, pendulum_spec) for _ in range(2))
    batches = [source.batch(step) for step in range(40)]
    assert_equal(resumed.batch(33), batches[33])


def test_fewer_blocks_than_workers_are_refused(
    data: TransitionDataset, config: RunConfig, pendulum_spec: SpaceSpec
) -> None:
    many = replace(config, scaling=replace(config.scaling, num_workers=7))
    with pytest.raises(DataError, match=r"has 5 block\(s\) of episodes to train on for 7 workers; use fewer workers"):
        source_of(data, many, pendulum_spec, num_blocks=5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"residency": "dataset"}, "scaling.num_workers: data.residency=dataset is Ray's, and 0 trains without Ray"),
        ({"path": "logs:make"}, "scaling.num_workers: data.path=logs:make makes a Ray Dataset, and 0 trains without"),
        ({"path": "logs:make", "residency": "streaming"}, "logs:make makes a Ray Dataset; set dataset, got streaming"),
        ({"path": "logs:make", "format": "csv"}, "data.format: it is about files, and data.path=logs:make makes"),
        ({"path": "", "mix": {"logs:make": 1.0}}, "data.mix: files are mixed, got the function logs:make"),
        (
            {"residency": "dataset", "return_source": "value", "values": "runs/x", "discount": 0.9},
            "data.discount: with data.residency=dataset learned values are relabelled at 1, got 0.9",
        ),
    ],
)
def test_what_a_ray_dataset_cannot_do_is_refused(tiny_config: RunConfig, changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_config(replace(tiny_config, data=replace(tiny_config.data, **changes)))

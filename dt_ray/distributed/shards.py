"""Shuffles a run's episodes by Ray Data into blocks, which the workers get by `ray.train.get_dataset_shard`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data
from jaxtyping import Int
from numpy import ndarray
from ray.data.dataset import MaterializedDataset

from dt_ray.config.schema import RunConfig
from dt_ray.data.logs.episodes import episode_schema, from_table, to_table
from dt_ray.data.logs.files import Block, DatasetFile
from dt_ray.data.normalizer import Normalizer
from dt_ray.data.spaces import SpaceSpec
from dt_ray.data.transitions import SOURCE_BITS, chosen_episodes
from dt_ray.distributed.functions import as_files
from dt_ray.errors import DataError
from dt_ray.learners import window_length_of
from dt_ray.models.state_values import StateValues
from dt_ray.training.file_facts import FileFacts, ForEach, read_chosen
from dt_ray.training.pools import POOL_SHARE
from dt_ray.training.relabeling import LearnedValues
from dt_ray.training.sharded import ShardedData
from dt_ray.training.stream_facts import StreamingData, capacity_of, in_units

BLOCK_BYTES = 2**25  # of a block of episodes, at most where its episodes are not longer
BLOCKS_A_POOL = 8  # at least, and as many for each worker
MAX_SAMPLED = 2**22  # returns-to-go, of all windows, that bounds of learned values are taken from
MAX_SHUFFLED = 256  # blocks between which Ray Data shuffles, which takes the square of that of small objects


def shard_episodes(
    episodes: ray.data.Dataset, config: RunConfig, spec: SpaceSpec, *, num_skipped_files: int, for_each: ForEach
) -> tuple[ShardedData, tuple[MaterializedDataset, ...]]:
    """What is known of a run's episodes, and those to train on in shuffled blocks: a dataset for each part of a mix.

    Raises:
        DataError: the data can't be trained on.
    """
    episodes, learned = episodes.materialize(), None
    usual = ray.data.DataContext.get_current().target_max_block_size
    episodes.context.target_max_block_size = usual  # joining fragments takes blocks as they are, and shuffling does not
    if config.relabels:
        learned = LearnedValues(config.data.values or "")
        episodes = _relabel(episodes, _find_facts(episodes, config, spec, for_each), learned, config)
        config = replace(config, data=replace(config.data, max_episodes=None, top_fraction=1.0))  # they are chosen
    files, facts = _find_facts(episodes, config, spec, for_each)
    built = StreamingData.build(files, facts, num_skipped_files=num_skipped_files)
    shards = tuple(_shuffle(episodes, mine, built, config) for mine in _by_dataset(built, config))
    lengths = [np.array(ray.get([_num_steps.remote(ref) for ref in shard.to_arrow_refs()])) for shard in shards]
    data = ShardedData(
        spec=built.spec,
        normalizer=built.normalizer,
        lengths=np.concatenate(lengths),
        sources=np.repeat(np.arange(len(lengths)), [len(each) for each in lengths]),
        validation=built.validation,
        values=None if learned is None else _values(learned, built, config, for_each),
        num_skipped_files=num_skipped_files,
        notes=built.notes,
        held_out=built.held_out,
    )
    data.check(config)
    return data, shards


def _find_facts(
    episodes: MaterializedDataset, config: RunConfig, spec: SpaceSpec, for_each: ForEach
) -> tuple[list[DatasetFile], FileFacts]:
    """The blocks of checked episodes as files, and what gathers facts about these."""
    path = ", ".join(config.data.paths)
    files = as_files(episodes, path, is_checked=True)
    if not files:
        raise DataError(f"{path} has no episode to train on")
    one_worker = replace(config.scaling, num_workers=1)  # these are not the blocks that workers share
    as_read = replace(config, data=replace(config.data, episode_per_file=False), scaling=one_worker)
    return files, FileFacts(as_read, spec, for_each=for_each)


def _by_dataset(built: StreamingData, config: RunConfig) -> Iterator[Int[ndarray, "_"]]:
    """The ids of the episodes to train on, of each dataset of the run."""
    sources = built.train_ids >> SOURCE_BITS if config.data.mix else np.zeros_like(built.train_ids)
    for source, path in enumerate(config.data.paths):
        mine = built.train_ids[sources == source]
        if not len(mine):
            raise DataError(f"no episode of {path} is left to train on, and data.mix gives it a share")
        yield mine


def _shuffle(
    episodes: MaterializedDataset, ids: Int[ndarray, "E"], built: StreamingData, config: RunConfig
) -> MaterializedDataset:
    """The episodes among these sorted ids in the model's units, shuffled, in blocks of a size that suits pools."""
    select = partial(_to_train, ids=ids, spec=built.spec, normalizer=built.normalizer, config=config)
    num = _num_blocks(len(ids), built, config)
    rows = episodes.map_batches(select, batch_format="pyarrow", batch_size=None)
    if episodes.num_blocks() > MAX_SHUFFLED:
        rows = rows.repartition(MAX_SHUFFLED)
    return rows.random_shuffle(seed=config.seed).repartition(num).materialize()


def _relabel(
    episodes: MaterializedDataset,
    found: tuple[list[DatasetFile], FileFacts],
    learned: LearnedValues,
    config: RunConfig,
) -> MaterializedDataset:
    """The episodes that are chosen, with learned values in their returns-to-go."""
    files, facts = found
    statistics = facts.of_episodes(files)
    ids, returns = (statistics[name].to_numpy() for name in ("episode_id", "return"))
    settings = config.data
    chosen = chosen_episodes(ids, returns, max_episodes=settings.max_episodes, top_fraction=settings.top_fraction)
    wanted = ids[chosen]

    def relabel(table: pa.Table) -> pa.Table:
        mine = np.flatnonzero(np.isin(table["episode_id"].to_numpy(), wanted)) if len(table) else ()
        with suppress(DataError):  # none of them has a step whose successor is known
            if len(mine):
                data = from_table(table, source="a block of episodes").select(mine)
                return to_table(learned.relabel(data, discount=settings.discount))
        return table.slice(0, 0)

    return episodes.map_batches(relabel, batch_format="pyarrow", batch_size=None).materialize()


def _values(learned: LearnedValues, built: StreamingData, config: RunConfig, for_each: ForEach) -> StateValues:
    """The learned values in the model's units, with bounds from a sample of the windows that are trained on."""
    length, ids = window_length_of(config), built.train_ids
    share = min(1.0, MAX_SAMPLED / (built.num_transitions * length))

    def sample(file: DatasetFile) -> ndarray:
        above = learned.above(read_chosen(file, ids, config, built.spec), length=length, discount=config.data.discount)
        return above if share == 1.0 else above[np.random.default_rng(file.index).random(len(above)) < share]

    return learned.inside(built.normalizer, np.concatenate(list(for_each(sample, built.files))))


def _num_blocks(num_episodes: int, built: StreamingData, config: RunConfig) -> int:
    """How many blocks hold so many of the episodes; it does not depend on the cluster, so that a run can go on."""
    workers, spec = config.scaling.max_workers, built.spec
    width = 4 * (spec.observation_dim + spec.action_dim + 1)
    pool = capacity_of(config, spec, share=POOL_SHARE / workers)
    steps = max(1, min(BLOCK_BYTES // width, pool // BLOCKS_A_POOL))
    num_steps = built.num_transitions * num_episodes // len(built.train_ids)  # about
    return min(num_episodes, max(-(-num_steps // steps), BLOCKS_A_POOL * workers))


def _to_train(
    table: pa.Table, ids: Int[ndarray, "E"], spec: SpaceSpec, normalizer: Normalizer, config: RunConfig
) -> Iterator[pa.Table]:
    """The episodes among these sorted ids, in the model's units and with their returns-to-go."""
    yield episode_schema(spec.observation_dim, spec.action_dim, with_returns=True).empty_table()
    if not len(table):
        return
    file = DatasetFile(index=0, path="", dataset="", block=Block(table.schema, lambda: table, is_checked=True))
    data = read_chosen(file, ids, config, spec)
    if data.num_episodes:
        yield to_table(in_units(data, config, normalizer))


@ray.remote
def _num_steps(table: pa.Table) -> int:
    return pc.sum(pc.list_value_length(table["rewards"])).as_py() or 0 if len(table) else 0

"""Ray Datasets that a function of the user makes (`data.path=module:function`), read like the files of a log."""

from __future__ import annotations

import importlib
import re
from functools import partial
from typing import Any, NamedTuple

import pyarrow as pa
import ray
import ray.data
from ray import cloudpickle
from ray.data.dataset import MaterializedDataset
from ray.exceptions import RayError

from dt_ray.config.schema import DataConfig
from dt_ray.data.logs.files import Block, DatasetFile
from dt_ray.data.logs.looks import read_shape_of
from dt_ray.data.spaces import SpaceSpec, spaces_of_log
from dt_ray.distributed.cluster import user_errors
from dt_ray.errors import ConfigError, DataError, UserError

EXCEPTION = re.compile(
    r"^\s*((?:\w+\.)*\w*(?:Error|Exception): .+)$", re.MULTILINE
)  # the first line of a traceback's end


class _Outline(NamedTuple):
    """What is known of a block without its rows."""

    schema: pa.Schema
    num_rows: int
    size: int


def call_function(path: str) -> ray.data.Dataset:
    """The Ray Dataset that `module:function` makes, with its rows in their order.

    Raises:
        ConfigError: there is no such function, it fails, or it makes something else.
    """
    place, _, name = path.partition(":")
    try:
        module = importlib.import_module(place)
        function = getattr(module, name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"data.path: can't load {path!r}: {error}") from None
    cloudpickle.register_pickle_by_value(module)  # tasks need not find it on their nodes
    try:
        dataset = function()
    except UserError:
        raise
    except Exception as error:
        raise ConfigError(f"data.path: {path} failed: {type(error).__name__}: {error}") from error
    if not isinstance(dataset, ray.data.Dataset):
        raise ConfigError(f"data.path: {path} returns a ray.data.Dataset, got {type(dataset).__name__}")
    dataset.context.enable_progress_bars = False
    dataset.context.execution_options.preserve_order = True
    return dataset


def blocks_of_function(path: str, format: str | None = None) -> list[DatasetFile]:
    """The rows of a function's dataset, which Ray Data reads once into the object store, as a file for each block.

    Raises:
        DataError: there are none, or what the function does to them fails.
    """
    try:
        files = as_files(call_function(path).materialize(), path)
    except RayError as error:
        fault = EXCEPTION.search(str(error))
        reason = fault.group(1) if fault else type(error).__name__
        raise DataError(f"{path} makes a Ray Dataset that can't be read: {reason}") from error
    if not files:
        raise DataError(f"{path} is empty: there is no row in it")
    return files


def as_files(dataset: MaterializedDataset, path: str, *, is_checked: bool = False) -> list[DatasetFile]:
    """The blocks of a dataset that have rows, each as a file that any process of the cluster can read."""
    refs: list[Any] = dataset.to_arrow_refs()
    outlines: list[_Outline] = ray.get([_outline.remote(ref) for ref in refs])
    found = [(ref, each) for ref, each in zip(refs, outlines, strict=True) if each.num_rows]
    return [
        DatasetFile(
            index=at,
            path=f"block {at} of {path}" if is_checked else path,
            dataset=path,
            size=each.size,
            block=Block(each.schema, partial(ray.get, ref), is_checked=is_checked),
        )
        for at, (ref, each) in enumerate(found)
    ]


def spaces_of_function(config: DataConfig) -> SpaceSpec:
    """The spaces of a function's dataset, by its first row.

    Raises:
        DataError: there is none, or it is not understood.
    """
    with user_errors():
        refs: list[Any] = call_function(config.path).limit(1).materialize().to_arrow_refs()
        row = pa.concat_tables(ray.get(refs)) if refs else pa.table({})
        if not len(row):
            raise DataError(f"{config.path} is empty: there is no row in it")
        file = DatasetFile(index=0, path=config.path, dataset=config.path, block=Block(row.schema, lambda: row))
        return spaces_of_log(*read_shape_of(file, config).dimensions)


@ray.remote
def _outline(table: pa.Table) -> _Outline:
    return _Outline(table.schema, len(table), table.nbytes)

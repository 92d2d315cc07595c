"""Pickled trajectories, as of the original Decision Transformer, decoded by an allow-list."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import pyarrow as pa

from dt_ray.config.schema import DataConfig
from dt_ray.data.formats.arrays import rows_of_parts
from dt_ray.data.formats.pickles import load_all
from dt_ray.data.logs.files import DatasetFile
from dt_ray.errors import DataError


def read_trajectories(file: DatasetFile, config: DataConfig) -> pa.Table:
    """The rows of a list of dicts of arrays, of one dict of arrays, or of several of either, dumped one after another.

    No episode goes on from one dict to the next.

    Raises:
        DataError: it is anything else; nothing in it is run.
    """
    with file.open() as stream:
        content = stream.read()
    try:
        dumps = load_all(content)
    except DataError as error:
        raise DataError(f"{file.path}: {error}") from None
    parts: list[dict[Any, Any]] = []
    for dump in dumps:
        kind = str(type(dump).__name__)
        trajectories: Any = [dump] if dump and isinstance(dump, dict) else dump
        is_list = isinstance(trajectories, list | tuple)
        if not is_list or not all(isinstance(each, dict) for each in cast("Sequence[Any]", trajectories)):
            raise DataError(f"{file.path} holds a {kind}, not a list of trajectories (dicts of arrays)")
        parts += cast("Sequence[dict[Any, Any]]", trajectories)
    if not parts:
        raise DataError(f"{file.path} is empty: it is a list of no trajectories")
    alone = len(parts) == 1 and isinstance(dumps[0], dict)  # whose ends say where its episodes end
    named = [("" if alone else f"trajectory {number}", dict(_flat(each))) for number, each in enumerate(parts)]
    return rows_of_parts(named, config, source=file.path, are_apart=not alone)


def _flat(arrays: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in arrays.items():
        if isinstance(value, dict):
            yield from _flat(cast("Mapping[Any, Any]", value), f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}", value

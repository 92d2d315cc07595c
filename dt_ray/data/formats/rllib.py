"""RLlib's offline output: JSON lines of SampleBatch, Parquet rows, and Parquet of msgpacked SingleAgentEpisode.

Observations may be LZ4-compressed pickles in base64: they are decoded by an allow-list. All three give rows, because
RLlib cuts episodes into fragments.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np
import pyarrow as pa

from dt_ray.data.formats.pickles import as_vector, load_arrays
from dt_ray.data.formats.tables import read_parquet
from dt_ray.data.logs.files import DatasetFile
from dt_ray.errors import DataError

COLUMNS = ("eps_id", "t", "obs", "actions", "rewards", "new_obs", "terminateds", "truncateds", "dones")
PACKED = b"BCJNGGhA"  # how a base64-encoded LZ4 frame begins


def read_json(file: DatasetFile, choose: Callable[[Sequence[str]], Sequence[str]]) -> pa.Table:
    """The rows of all SampleBatch lines, in the columns that `choose` takes of those that they have."""
    with file.open() as stream:
        try:
            lines = stream.read().decode().splitlines()
        except UnicodeDecodeError as error:
            raise DataError(f"{file.path} is no JSON: {error}") from None
    batches: list[tuple[str, dict[str, Any]]] = []
    for number, line in enumerate(lines, start=1):
        where = f"{file.path}, line {number}"
        try:
            batch = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where} is no JSON: {error}") from None
        is_batch = isinstance(batch, dict) and cast("dict[str, Any]", batch).get("type") == "SampleBatch"
        if not is_batch:
            raise DataError(f"{where} is no SampleBatch of RLlib, the only JSON log that is read")
        batches.append((where, cast("dict[str, Any]", batch)))
    names = dict.fromkeys(name for _, batch in batches for name in batch if name != "type")
    # All of them, so that they are checked even where `choose` takes fewer.
    known = {name: _column(batches, name) for name in names if name in COLUMNS}
    rows = {name: known.get(name) or _column(batches, name) for name in choose(list(names))}
    sizes = {name: len(values) for name, values in rows.items()}
    if len(set(sizes.values())) > 1:
        raise DataError(f"{file.path}: columns of different lengths: {sizes}")
    try:
        return pa.table(rows)
    except (pa.ArrowException, ValueError, TypeError, OverflowError) as error:
        raise DataError(f"{file.path}: the values of a column are of different kinds: {error}") from None


def numbers_in_line(batch: Mapping[str, Any]) -> int:
    """How many numbers a SampleBatch has."""
    columns = [[*_values(batch[name], name)] for name in COLUMNS if name in batch]
    return sum(np.size(value) for column in columns for value in column)


def _column(batches: Sequence[tuple[str, Mapping[str, Any]]], name: str) -> list[Any]:
    return [value for where, batch in batches if name in batch for value in _values(batch[name], f"{where}, {name}")]


def decode_rows(rows: pa.Table, *, source: str) -> pa.Table:
    """The rows with their packed columns decoded."""
    for index, name in enumerate(rows.column_names):
        column = rows[name]
        if pa.types.is_string(column.type) and len(column) and (column[0].as_py() or "").startswith(PACKED.decode()):
            where = f"{source}, {name}"
            if column.null_count:
                raise DataError(f"{where}: {column.null_count} missing value(s); every step needs one")
            vectors = [_packed_vector(value, where) for value in column.to_pylist()]
            rows = rows.set_column(index, name, pa.array(vectors, pa.list_(pa.float32())))
    return rows


def _packed_vector(text: str, where: str) -> list[float]:
    value = _unpack(text, where)
    try:
        return as_vector(value).ravel().tolist()
    except (ValueError, TypeError) as error:
        raise DataError(f"{where} is packed and holds no vector: {error}") from None


def is_episodes(schema: pa.Schema) -> bool:
    """Whether the file has RLlib's column of packed episodes."""
    return schema.names == ["item"] and pa.types.is_binary(schema.field("item").type)


def read_episodes(file: DatasetFile) -> pa.Table:
    """The rows of all SingleAgentEpisode fragments."""
    import msgpack

    items = read_parquet(file)["item"].to_pylist()
    try:
        states = [msgpack.unpackb(item, object_hook=_array, strict_map_key=False) for item in items]
        return pa.concat_tables([_rows_of(state) for state in states])
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError, pa.ArrowException) as error:
        raise DataError(f"{file.path} holds no SingleAgentEpisodes of RLlib: {error!r}") from None


def _rows_of(state: Mapping[str, Any]) -> pa.Table:
    rewards = as_vector(_steps(state["rewards"]))
    num = len(rewards)
    observations, actions = as_vector(_steps(state["observations"])), as_vector(_steps(state["actions"]))
    last = np.arange(num) == num - 1
    return pa.table(
        {
            "eps_id": [state["id_"]] * num,
            "t": state["t_started"] + np.arange(num),
            "obs": list(observations[:num].reshape(num, -1)),
            "actions": list(actions.reshape(num, -1)),
            "rewards": rewards,
            "new_obs": list(observations[1:].reshape(num, -1)),
            "terminateds": last & bool(state["is_terminated"]),
            "truncateds": last & bool(state["is_truncated"]),
        }
    )


def _steps(buffer: Mapping[str, Any]) -> Any:
    """The values of an episode's own steps: what lies before them was carried over from the fragment before."""
    return buffer["data"][buffer["lookback"] :]


def _array(value: dict[Any, Any]) -> Any:
    """What msgpack-numpy packed; arrays of objects, which it pickles, are refused."""
    if b"nd" not in value:
        return value
    if value.get(b"kind") == b"O":
        raise ValueError("an array of objects")
    dtype = np.dtype(value[b"type"])
    array = np.frombuffer(value[b"data"], dtype)
    return array.reshape(value[b"shape"]) if value[b"nd"] else array[0]


def _values(column: Any, where: str) -> Iterator[Any]:
    if isinstance(column, str):
        column = _unpack(column, where)
    kind: type = type(cast("object", column))
    if not issubclass(kind, list | tuple | np.ndarray) or np.ndim(column) == 0:
        raise DataError(f"{where}: a column is {kind.__name__}, not a list with a value for each step")
    for value in column:
        yield value.tolist() if isinstance(value, np.ndarray | np.generic) else value


def _unpack(text: str, where: str) -> Any:
    """An array out of base64(LZ4(pickle)).

    Raises:
        DataError: it isn't that, or it isn't an array; nothing in it is run.
    """
    try:
        import lz4.frame
    except ImportError:
        raise DataError(f"{where} is compressed with LZ4: pip install 'dt-ray[formats]'") from None
    try:
        return load_arrays(lz4.frame.decompress(base64.b64decode(text)))
    except (ValueError, RuntimeError, DataError) as error:
        raise DataError(f"{where}: {error}") from None

"""Facts about the files of a dataset, kept from one run for the next, so that a file is read for them once.

They lie in `STORAGE_PATH/.file-facts`, which runs can write where datasets often can't be: one Parquet file for each
dataset and all else that the facts depend on. It is written at once, so that it is whole wherever it is there; of two
runs that write it together the later one wins, with the same facts. Facts of a file are used while its size and the
time of its last change stay the same. The folder may be deleted at any time.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from hashlib import blake2b
from importlib.metadata import version
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dt_ray.data.logs.files import DatasetFile
from dt_ray.errors import StorageError
from dt_ray.runs.storage import Folder

FOLDER = ".file-facts"
VERSION = 1  # raise it where a fact changes, or what reading makes of a file
KEYS = b"dt_ray_files"  # of the metadata: a list of the files, in the order of their numbers in the column `file`
RECENT_NS = 2 * 10**9  # a file that changed so shortly before it was listed may change again at the same time

Fault = TypeVar("Fault", bound=str)

log = logging.getLogger("dt_ray")


class FactStore:
    """Tables of facts, one for each file, that depend on `dependencies` beside the file: anything with a full repr."""

    def __init__(self, storage_path: str, *dependencies: Any) -> None:
        text = repr((VERSION, version("dt-ray"), dependencies))
        name = blake2b(text.encode(), digest_size=16).hexdigest()
        self.place = Folder.at(storage_path) / FOLDER / f"{name}.parquet"
        self._made_ns = time.time_ns()  # not later than files are listed

    def gather(
        self, files: Sequence[DatasetFile], look: Callable[[Sequence[DatasetFile]], Iterable[pa.Table | Fault]]
    ) -> list[pa.Table | Fault]:
        """The facts of these files: those that are known, and of the others what `look` finds.

        Tables are kept for later runs. Faults of files, which are no tables, are not: it may be mended otherwise.
        """
        unknown = [file for file in files if _key(file) not in self._known]
        found = dict(zip(map(_key, unknown), look(unknown) if unknown else (), strict=True))
        result = [(self._known | found)[_key(file)] for file in files]
        self._known.update({key: facts for key, facts in found.items() if isinstance(facts, pa.Table)})
        latest = self._made_ns - RECENT_NS
        lasting = [file for file in files if file.stamp is not None and file.stamp[1] < latest]
        kept = {key: self._known[key] for key in map(_key, lasting) if key in self._known}
        if found.keys() & kept:
            self._write(kept)
        return result

    def of(self, file: DatasetFile) -> pa.Table | None:
        """The known facts of a file."""
        return self._known.get(_key(file))

    @cached_property
    def _known(self) -> dict[str, pa.Table]:
        try:
            table = pq.read_table(pa.BufferReader(self.place.read_bytes()), page_checksum_verification=True)
            keys = json.loads(table.schema.metadata[KEYS])
        except (FileNotFoundError, StorageError, pa.ArrowException, OSError, KeyError, TypeError, ValueError):
            return {}  # the files are read again
        begins = np.searchsorted(table["file"].to_numpy(), np.arange(len(keys) + 1)).tolist()
        facts = table.drop_columns(["file"]).replace_schema_metadata(None)
        return {key: facts.slice(begin, end - begin) for key, (begin, end) in zip(keys, pairwise(begins), strict=True)}

    def _write(self, facts: Mapping[str, pa.Table]) -> None:
        numbers = np.repeat(np.arange(len(facts)), [len(table) for table in facts.values()])
        table = pa.concat_tables(facts.values()).append_column("file", pa.array(numbers))
        sink = pa.BufferOutputStream()
        pq.write_table(
            table.replace_schema_metadata({KEYS: json.dumps(list(facts))}),
            sink,
            use_compliant_nested_type=False,  # so that what is read has the schema of what was written
            write_page_checksum=True,
        )
        try:
            self.place.write_bytes(sink.getvalue().to_pybytes())
        except StorageError as error:
            log.warning("facts about the dataset's files are not kept, the next start reads all again: %s", error)


def _key(file: DatasetFile) -> str:
    rows = None if file.rows is None else (file.rows.begin, file.rows.num_rows)
    return json.dumps([file.path, file.row_groups, rows, file.stamp])

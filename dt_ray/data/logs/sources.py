"""The files of a dataset that are trained on, and whether their episode ids need the file's number."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from jaxtyping import Int
from numpy import ndarray

from dt_ray.config.schema import DataConfig
from dt_ray.data.formats import is_flat
from dt_ray.data.formats.tables import read_parquet
from dt_ray.data.logs.episodes import episode_ids_of
from dt_ray.data.logs.files import DatasetFile, find_files, join_parts
from dt_ray.data.logs.reading import fault_in_file
from dt_ray.data.spaces import SpaceSpec
from dt_ray.errors import DataError

log = logging.getLogger("dt_ray")


def sound_files(
    config: DataConfig,
    faults_of_files: Callable[[list[DatasetFile]], list[str | None]],
    ids_of: Callable[[list[DatasetFile]], list[Int[ndarray, "E"]]],
    find: Callable[[str, str | None], Sequence[DatasetFile]] = find_files,
) -> tuple[list[DatasetFile], int]:
    """The files to train on, and how many `data.on_corrupt=skip` leaves out; their faults are logged.

    `find` has the files of a path and a format.

    Raises:
        DataError: there is no file, no sound file, or files with a row per step are to be left out.
    """
    all_files = [
        replace(file, source=source) for source, path in enumerate(config.paths) for file in find(path, config.format)
    ]
    if config.episode_per_file:
        all_files = join_parts(all_files)
    files = [replace(file, index=index) for index, file in enumerate(all_files)]
    if config.on_corrupt == "stop":
        return number_files(files, config, ids_of), 0
    found = faults_of_files(files)
    sound = [file for file, fault in zip(files, found, strict=True) if fault is None]
    faults = [fault for fault in found if fault is not None]
    if not sound:
        raise DataError(f"no file of {', '.join(config.paths)} can be trained on; the first: {faults[0]}")
    if faults and is_flat(sound[0], config):
        raise DataError(
            f"data.on_corrupt=skip leaves out whole files, and {sound[0].dataset} has a row per step: an episode may "
            f"go on in a file that is left out; mend it, or import what is sound first: {faults[0]}"
        )
    for fault in faults:
        log.warning("left out: %s", fault)
    return number_files(sound, config, ids_of), len(faults)


def number_files(
    files: list[DatasetFile], config: DataConfig, ids_of: Callable[[list[DatasetFile]], list[Int[ndarray, "E"]]]
) -> list[DatasetFile]:
    """The files, marked where episode ids repeat in other files, so that the file's number is added to the ids.

    Raises:
        DataError: a file can't be read.
    """
    if config.episode_per_file or is_flat(files[0], config):
        return files  # their episodes are numbered as the files are, or by a plan
    if not all(file.format == "parquet" for file in files):
        return [replace(file, is_numbered=True) for file in files]
    if len(files) == 1:
        return files
    ids = ids_of(files)
    own = {source: [found for file, found in zip(files, ids, strict=True) if file.source == source] for source in
           {file.source for file in files}}  # fmt: skip
    repeated = any(len(np.unique(np.concatenate(found))) < sum(map(len, found)) for found in own.values())
    return [replace(file, is_numbered=True) for file in files] if repeated else files


def read_episode_ids(file: DatasetFile) -> Int[ndarray, "E"]:
    """The logged ids of a file with a row per episode.

    Raises:
        DataError: the file can't be read.
    """
    return episode_ids_of(read_parquet(file, ["episode_id"]), source=file.path)


def sound_files_here(config: DataConfig, spec: SpaceSpec | None) -> tuple[list[DatasetFile], int]:
    """`sound_files`, looked for in this process."""
    return sound_files(
        config,
        lambda files: [fault_in_file(file, config, spec) for file in files],
        lambda files: [read_episode_ids(file) for file in files],
    )

"""Whether what is on the driver's disk is there for every node: on one machine it is, on a cluster only by chance."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from pathlib import Path

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from dt_ray.config import RunConfig
from dt_ray.errors import ConfigError

JOB_FOLDER = "runtime_resources/working_dir_files"  # where Ray unpacks a job's working directory, and deletes it
REMEDY = "give a folder on a disk that all nodes share, or a URI like s3://BUCKET/runs"


def check_storage(config: RunConfig) -> None:
    """Raises:
    ConfigError: `storage_path` is on a disk that some node does not see, or goes with the job.
    """
    place = config.storage_path
    if _is_local(place):
        _check_seen("storage_path", Path(place), writes=True)


def check_data(config: RunConfig) -> None:
    """Raises:
    ConfigError: a dataset is on a disk that some node does not see.
    """
    for place in map(Path, filter(_is_local, config.data.paths)):
        if place.exists():  # else its reader says so
            _check_seen("data.path", place, writes=False)


def _is_local(place: str) -> bool:
    return "://" not in place and not place.startswith("minari:")


def _check_seen(setting: str, place: Path, *, writes: bool) -> None:
    if writes and JOB_FOLDER in str(place):
        raise ConfigError(
            f"{setting}: {place} is in the job's own copy of its working directory, which Ray deletes; {REMEDY}"
        )
    nodes = [node for node in ray.nodes() if node["Alive"]]
    if len(nodes) < 2:
        return
    blind = _blind_to_new_file(place, nodes) if writes else _blind(place, nodes)
    if blind:
        raise ConfigError(f"{setting}: {place} is not there for {', '.join(blind)} of {len(nodes)} nodes; {REMEDY}")


def _blind_to_new_file(folder: Path, nodes: Sequence[dict]) -> list[str]:
    """`_blind` for a file that is written into a folder; the folder is made for it, and stays only if all see it."""
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f".seen-{uuid.uuid4().hex}"
    file.touch()
    try:
        blind = _blind(file, nodes)
    finally:
        file.unlink()
    for each in made if blind else []:
        each.rmdir()
    return blind


def _blind(file: Path, nodes: Sequence[dict]) -> list[str]:
    """The addresses of the nodes that don't see a file, in order."""
    looks = [
        _sees.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(str(file))
        for node in nodes
    ]
    return sorted(node["NodeManagerAddress"] for node, seen in zip(nodes, ray.get(looks), strict=True) if not seen)


@ray.remote(num_cpus=0)
def _sees(file: str) -> bool:
    return Path(file).exists()

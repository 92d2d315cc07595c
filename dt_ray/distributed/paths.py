"""Checks that every node sees the files that are on the driver's disk."""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from dt_ray.config.schema import RunConfig
from dt_ray.errors import ConfigError, ResourceError

JOB_FOLDER = "runtime_resources/working_dir_files"  # where Ray unpacks a job's working directory, and deletes it
ANSWERS_WITHIN_S = 120.0  # a node, where it may first have to start a process
MAX_QUESTIONS = 3  # to a node that is alive and does not answer
REMEDY = "give a folder on a disk that all nodes share, or a URI like s3://BUCKET/runs"


def check_storage(config: RunConfig) -> None:
    """Raises:
    ConfigError: `storage_path` is on a disk that a node does not see, or in a folder that is deleted with the job.
    """
    place = config.storage_path
    if _is_local(place):
        _check_seen("storage_path", Path(place), writes=True)


def check_data(config: RunConfig) -> None:
    """Raises:
    ConfigError: a dataset is on a disk that some node does not see.
    """
    for place in map(Path, filter(_is_local, config.data.paths)):
        if place.exists():  # otherwise reading it fails with a message
            _check_seen("data.path", place, writes=False)


def _is_local(place: str) -> bool:
    return "://" not in place and not place.startswith("minari:")


def _check_seen(setting: str, place: Path, *, writes: bool) -> None:
    if writes and JOB_FOLDER in str(place):
        raise ConfigError(
            f"{setting}: {place} is in the job's own copy of its working directory, which Ray deletes; {REMEDY}"
        )
    if len(alive_nodes()) < 2:
        return
    without_access, num_nodes = _find_nodes_without_new_file(place) if writes else ask_each_node(place)
    if without_access:
        raise ConfigError(
            f"{setting}: {place} is not there for {', '.join(without_access)} of {num_nodes} nodes; {REMEDY}"
        )


def _find_nodes_without_new_file(folder: Path) -> tuple[list[str], int]:
    """`ask_each_node` for a new file in a folder, which is created if needed and kept if all nodes see it."""
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f".seen-{uuid.uuid4().hex}"
    file.touch()
    try:
        without_access, num_nodes = ask_each_node(file)
    finally:
        file.unlink()
    for each in made if without_access else []:
        each.rmdir()
    return without_access, num_nodes


def alive_nodes() -> dict[str, str]:
    """The addresses of the nodes that are there, by their ids."""
    return {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}


def ask_each_node(
    file: Path,
    *,
    alive: Callable[[], Mapping[str, str]] = alive_nodes,
    ask: Callable[[str, str], ray.ObjectRef] = lambda node, file: _sees.options(
        scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)
    ).remote(file),
    answer: Callable[[ray.ObjectRef], bool] = lambda call: ray.get(call, timeout=ANSWERS_WITHIN_S),
) -> tuple[list[str], int]:
    """The addresses of the nodes that don't see a file, in order, and how many nodes were asked.

    A node that goes before it has answered is no error, and one that comes meanwhile is asked too.

    Raises:
        ResourceError: a node is there and does not answer.
    """
    answers: dict[str, bool] = {}
    failures: Counter[str] = Counter()
    while waiting := {node: address for node, address in alive().items() if node not in answers}:
        calls = {node: ask(node, str(file)) for node in waiting}
        seen = {node: _answer_of(call, answer) for node, call in calls.items()}
        answers |= {node: sees for node, sees in seen.items() if sees is not None}
        failures.update(node for node, sees in seen.items() if sees is None)
        there = alive()
        silent = [there[node] for node, times in failures.items() if times >= MAX_QUESTIONS and node in there]
        if silent:
            raise ResourceError(f"no answer from {', '.join(sorted(silent))}, asked {MAX_QUESTIONS} times about {file}")
    there = alive()
    answers = {node: sees for node, sees in answers.items() if node in there}
    return sorted(there[node] for node, sees in answers.items() if not sees), len(answers)


def _answer_of(call: ray.ObjectRef, answer: Callable[[ray.ObjectRef], bool]) -> bool | None:
    """The answer of a node; None where the node or its process has gone."""
    try:
        return answer(call)
    except RayError:
        return None


@ray.remote(num_cpus=0)
def _sees(file: str) -> bool:
    return Path(file).exists()

"""Nothing waits for ever on a cluster: a run ends with one message, and touches nothing of others."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
import ray._private.state
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from support.deadly import DEADLY_SEED
from support.examples import tiny_overrides, with_workers
from support.processes import WAIT_S, wait_until

from dt_ray import sweep
from dt_ray.api import DecisionTransformer
from dt_ray.config.schema import RunConfig
from dt_ray.distributed import controller
from dt_ray.distributed import preparing as data_tasks
from dt_ray.distributed.actors import RunBoard
from dt_ray.distributed.evaluation import EvaluationActors, find_crash
from dt_ray.distributed.training import RayTrainContext
from dt_ray.errors import EnvironmentCrashError, ResourceError, RunError, StorageError
from dt_ray.jobs.training import start_run
from dt_ray.runs.folder import RunFolder

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


def test_a_full_disk_of_one_worker_ends_all_with_one_message(tiny_config: RunConfig) -> None:
    run = with_workers(tiny_config, 2, total_timesteps=1_000_000)
    run = replace(run, evaluation=replace(run.evaluation, every=0))
    checkpoints = Path(str(RunFolder.of(run).checkpoints))

    def fill() -> None:
        wait_until((checkpoints / "latest").exists)
        checkpoints.rename(checkpoints.with_name("elsewhere"))
        checkpoints.touch()  # no file can be written below a file

    with ThreadPoolExecutor(1) as other:
        other.submit(fill)
        with pytest.raises(StorageError, match="can't (write|read)"):  # a file of the checkpoint that is being written
            start_run(run)


def test_an_environment_that_ends_its_process_is_named_with_its_seed(tiny_config: RunConfig) -> None:
    """Six episodes on two actors, one of which can't be played by any."""
    policy = DecisionTransformer(tiny_config).policy()
    settings = replace(tiny_config.evaluation, num_episodes=6, seed=0)
    actors = EvaluationActors(EvaluationActors.start(2), "support.deadly:Deadly-v0", settings)
    with pytest.raises(EnvironmentCrashError, match=rf"support.deadly:Deadly-v0 .* with seed {DEADLY_SEED};"):
        actors.submit(policy, step=1).result(timeout=WAIT_S)
    actors.end()


@pytest.mark.parametrize("deadly", [*range(7), None])
def test_the_episode_that_is_not_survived_is_found(deadly: int | None) -> None:
    tried: list[Sequence[int]] = []

    def survives(episodes: Sequence[int]) -> bool:
        tried.append(episodes)
        return deadly not in episodes

    assert find_crash(list(range(7)), survives) == (list(range(7)) if deadly is None else [deadly])
    assert len(tried) <= 4


def deadly_settings(data: Path, storage: Path) -> list[str]:
    settings = [*tiny_overrides(data, storage), "env_id=support.deadly:Deadly-v0", "scaling.num_workers=1"]
    return [*settings, "evaluation.num_actors=0", "evaluation.num_episodes=5", "evaluation.seed=0"]


@pytest.mark.nightly
def test_a_run_that_evaluates_in_its_worker_ends_with_the_seed_too(tiny_config: RunConfig) -> None:
    run = with_workers(tiny_config, 1, env_id="support.deadly:Deadly-v0")
    run = replace(run, evaluation=replace(run.evaluation, num_actors=0, num_episodes=5, seed=0))
    with pytest.raises(EnvironmentCrashError, match=f"seed {DEADLY_SEED};"):
        start_run(run)


@pytest.mark.nightly
def test_a_sweep_ends_with_the_seed_too(pendulum_data: Path, tmp_path: Path) -> None:
    settings = [*deadly_settings(pendulum_data, tmp_path), "optim.learning_rate={grid: [0.001]}"]
    with pytest.raises(RunError, match=f"seed {DEADLY_SEED};"):
        sweep.main(["--sweep", "target_return_context_length", "model.context_length=4", *settings])


def test_a_second_run_on_a_full_cluster_is_refused_with_who_uses_it(tiny_config: RunConfig) -> None:
    group = placement_group([{"CPU": 4}])
    assert group.wait(WAIT_S)
    try:
        with pytest.raises(ResourceError, match=r"0 of 4 CPUs are free; in use by job .*\(4 CPUs\).*wait_for_nodes_s"):
            start_run(with_workers(tiny_config, 1))
        assert not RunFolder.of(with_workers(tiny_config, 1)).folder.exists()
    finally:
        remove_placement_group(group)


def test_workers_whose_place_was_taken_after_the_plan_end_with_who_took_it(
    tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    groups: list[PlacementGroup] = []
    prepare = data_tasks.prepare_data

    def prepare_and_take(*arguments: Any) -> Any:
        data = prepare(*arguments)
        groups.append(placement_group([{"CPU": 4}]))
        assert groups[0].wait(WAIT_S)
        return data

    monkeypatch.setattr(data_tasks, "prepare_data", prepare_and_take)
    monkeypatch.setattr(controller, "PLACED_WITHIN_S", 4.0)
    monkeypatch.setattr(controller, "SAYS_AFTER_S", 0.0)  # at the first look, however late it comes
    try:
        with pytest.raises(ResourceError, match=r"1 worker\(s\) with 3 CPU\(s\) each had no place for 4 s: 0 of 4"):
            start_run(with_workers(tiny_config, 1))
        assert "waiting up to 4 s for room for 1 worker(s)" in caplog.text
        assert [state["state"] for state in placement_group_table().values()].count("CREATED") == 1
    finally:
        remove_placement_group(groups[0])


def test_a_stop_is_heard_by_the_successor_of_a_lost_board() -> None:
    board: Any = ray.remote(num_cpus=0, max_restarts=-1)(RunBoard).remote()
    context = RayTrainContext.__new__(RayTrainContext)
    context.board, context.stop_asked, context.move_asked = board, threading.Event(), threading.Event()
    listening = threading.Thread(target=context._listen, daemon=True)
    listening.start()
    ray.kill(board, no_restart=False)  # with what was asked of it
    while not context.stop_asked.wait(0.5):  # as the driver asks, until the workers have ended
        board.ask.remote("stop")
    listening.join(WAIT_S)
    ray.kill(board)


def test_a_fit_that_has_ended_is_not_fitted_again() -> None:
    """A second signal ends the connection under it, and what is fitted then would start another Ray."""

    class Trainer:
        num_fits = 0

        def fit(self) -> None:
            self.num_fits += 1
            while not fit._has_ended.is_set():
                time.sleep(0.01)
            raise ray.exceptions.RayActorError

    trainer = Trainer()
    board: Any = ray.remote(num_cpus=0)(RunBoard).remote()
    fit = controller.Fit(trainer, board, max_failures=3, needs="", wait_s=0)  # type: ignore[arg-type]

    def interrupt(*arguments: Any) -> None:
        raise KeyboardInterrupt

    fit._look = interrupt  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        fit.run()
    fit._thread.join(WAIT_S)
    assert trainer.num_fits == 1
    ray.kill(board)

"""What a trial of a population hands on is the checkpoint of the step that it reports, wherever checkpoints lie."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray.tune
from pyarrow import fs
from support.object_store import ObjectStore

from dt_ray.config.loading import to_plain
from dt_ray.config.schema import RunConfig
from dt_ray.data.filesystems import reach
from dt_ray.distributed.trials import TrialContext, copy_checkpoint, local_copy
from dt_ray.jobs.training import start_run
from dt_ray.runs.checkpoint import FILES, checkpoint_fault, read_facts
from dt_ray.runs.folder import RunFolder
from dt_ray.runs.storage import Folder
from dt_ray.sweeps.loading import decode_sweep
from dt_ray.training.loop import run_training
from dt_ray.training.preparing import make_source
from dt_ray.training.resident import ResidentData


@pytest.mark.parametrize("kind", ["disk", "object store"])
def test_a_checkpoint_is_copied_from_wherever_it_lies(
    tiny_config: RunConfig, tmp_path: Path, object_store: ObjectStore, kind: str
) -> None:
    place = str(tmp_path) if kind == "disk" else f"s3://bucket/{tmp_path.name}"
    config = replace(tiny_config, storage_path=place, total_timesteps=10)
    start_run(config)
    run = RunFolder.of(config)
    assert copy_checkpoint(run.checkpoint(10), str(tmp_path / "copy")) is None
    assert read_facts(Folder.at(tmp_path / "copy")).step == 10
    assert copy_checkpoint(run.checkpoint(7), str(tmp_path / "none")) is not None

    filesystem, path = reach(run.checkpoint(5).uri)
    given = ray.tune.Checkpoint(path, filesystem)
    (tmp_path / "download").mkdir()
    local = local_copy(given, str(tmp_path / "download"))
    assert checkpoint_fault(local) is None
    assert read_facts(local).step == 5
    assert (local.uri == path) == isinstance(filesystem, fs.LocalFileSystem)


def test_a_trial_that_goes_on_from_an_earlier_step_reports_its_new_weights(
    tiny_config: RunConfig, tmp_path: Path, pendulum_spec: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It had come to update 20 by itself, and takes over another trial's checkpoint of update 10."""
    from dt_ray.data import read_dataset

    better = replace(tiny_config, name="better", seed=1, total_timesteps=10)
    start_run(better)
    mine = replace(tiny_config, name="mine", total_timesteps=25)
    start_run(replace(mine, total_timesteps=20))
    given = ray.tune.Checkpoint(str(RunFolder.of(better).checkpoint(10)), fs.LocalFileSystem())
    reported: list[tuple[dict[str, float], bytes, int]] = []

    def report(metrics: dict[str, float], checkpoint: ray.tune.Checkpoint) -> None:
        copy = Folder(str(tmp_path / f"reported-{len(reported)}"))
        shutil.copytree(checkpoint.path, copy.uri)
        reported.append((metrics, (copy / FILES[0]).read_bytes(), read_facts(copy).step))

    monkeypatch.setattr(ray.tune, "report", report)
    monkeypatch.setattr(ray.tune, "get_checkpoint", lambda: given)
    sweep = decode_sweep({"scheduler": "pbt", "num_samples": 2, "optim.learning_rate": {"log_uniform": [1e-4, 1e-2]}},
                         to_plain(mine) | {"name": "pbt"}, (), default_name="pbt")  # fmt: skip
    mine = replace(mine, seed=1)
    data = ResidentData.build(read_dataset(mine.data, pendulum_spec), pendulum_spec, mine)
    context = TrialContext(mine, sweep, device="cpu")
    run = RunFolder.of(mine)
    run_training(mine, make_source(data, mine), context)
    context.report_evaluation(run.read_evaluation(20))  # the training may have ended before it was written
    assert [(metrics["step"], step) for metrics, _, step in reported] == [(20, 20)]
    (metrics, weights, _) = reported[0]
    assert weights == (run.checkpoint(20) / FILES[0]).read_bytes()
    assert metrics["return_mean"] == run.read_evaluation(20).highest_mean

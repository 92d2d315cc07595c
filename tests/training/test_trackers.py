"""Trackers get the numbers of metrics.jsonl and of the evaluations, once each, also where a run goes on."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from dt_ray.config.schema import LoggingConfig, RunConfig
from dt_ray.errors import ConfigError
from dt_ray.jobs.training import resume_run, resumed_config, start_run
from dt_ray.runs.folder import RunFolder
from dt_ray.training.trackers import check_trackers


def tracked_run(tiny_config: RunConfig, tracker: str) -> RunFolder:
    """Ten updates, then ten more."""
    config = replace(tiny_config, logging=LoggingConfig(every=5, trackers=(tracker,)), total_timesteps=10)  # type: ignore[arg-type]
    start_run(config)
    run = RunFolder.of(config)
    resume_run(resumed_config(str(run), ["total_timesteps=20"]))
    return run


def metrics_of(run: RunFolder) -> dict[int, float]:
    lines = [json.loads(line) for line in run.metrics_file.read_text().splitlines()]
    return {line["step"]: pytest.approx(line["train/loss"], rel=1e-6) for line in lines}


def test_tensorboard_has_every_metric_and_evaluation(tiny_config: RunConfig) -> None:
    from tensorboardX.proto.event_pb2 import Event

    run = tracked_run(tiny_config, "tensorboard")
    found: dict[str, dict[int, float]] = {}
    for file in sorted(Path(str(run.folder), "tensorboard").iterdir()):
        content, place = file.read_bytes(), 0
        while place < len(content):  # a record: its length and a checksum, the event and a checksum
            length = int.from_bytes(content[place : place + 8], "little")
            event = Event.FromString(content[place + 12 : place + 12 + length])
            for value in event.summary.value:
                found.setdefault(value.tag, {})[event.step] = value.simple_value
            place += length + 16
    assert found["train/loss"] == metrics_of(run)
    means = {report.step: pytest.approx(report.targets[0].return_mean) for report in run.read_evaluations()}
    assert found["evaluation/return_mean/-100"] == means


@pytest.mark.slow
def test_mlflow_has_every_metric_once_in_one_run(tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    run = tracked_run(tiny_config, "mlflow")
    client = MlflowClient(f"sqlite:///{run.folder.parent}/mlflow.db")
    experiment = client.get_experiment_by_name("dt_ray")
    assert experiment is not None
    (found,) = client.search_runs([experiment.experiment_id])
    history = client.get_metric_history(found.info.run_id, "train/loss")
    assert {metric.step: metric.value for metric in history} == metrics_of(run)
    assert found.data.params["model.width"] == "16"
    assert found.info.status == "FINISHED"


@pytest.mark.slow
def test_wandb_works_offline(tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = tracked_run(tiny_config, "wandb")
    logs = list(Path(str(run.folder), "wandb").glob("offline-run-*/run-*.wandb"))
    assert logs
    content = b"".join(log.read_bytes() for log in logs)
    assert b"train/loss" in content
    assert b"evaluation/return_mean/-100" in content


def test_a_tracker_that_can_not_write_is_refused_before_the_run(
    tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(tiny_config, logging=LoggingConfig(trackers=("wandb",)))
    with pytest.raises(ConfigError, match="would write to a local folder"):
        check_trackers(replace(config, storage_path="s3://bucket/runs"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'pip install "dt-ray\[wandb\]"'):
        check_trackers(config)

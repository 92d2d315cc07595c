"""Sends metrics and evaluations to TensorBoard, MLflow or Weights & Biases; `metrics.jsonl` is always written too.

Each is an extra: `pip install "dt-ray[mlflow]"`. A resumed run continues in the same place.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Protocol

from dt_ray.config.loading import to_plain
from dt_ray.config.schema import RunConfig
from dt_ray.errors import ConfigError
from dt_ray.runs.evaluation_report import EvaluationReport
from dt_ray.runs.folder import RunFolder

log = logging.getLogger("dt_ray")

PROJECT = "dt_ray"
MLFLOW_URI = "MLFLOW_TRACKING_URI"
MLFLOW_PATIENCE = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
}  # MLflow's own values make it wait for minutes
PACKAGES = {"tensorboard": "tensorboardX", "mlflow": "mlflow", "wandb": "wandb"}


class Tracker(Protocol):
    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class TensorBoardTracker:
    """Event files in the run's folder: `tensorboard --logdir runs`."""

    def __init__(self, config: RunConfig, run: RunFolder, *, step: int) -> None:
        from tensorboardX import SummaryWriter

        purged = step + 1 if step else None  # later steps are made again
        self.writer = SummaryWriter(str(run.folder / "tensorboard"), purge_step=purged, filename_suffix=f".{step}")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class MLflowTracker:
    """A run of the experiment `dt_ray` at MLFLOW_TRACKING_URI, else in `mlflow.db` beside the runs."""

    def __init__(self, config: RunConfig, run: RunFolder, *, step: int) -> None:
        for name, value in MLFLOW_PATIENCE.items():
            os.environ.setdefault(name, value)
        from mlflow import MlflowClient

        self.client = MlflowClient(os.environ.get(MLFLOW_URI) or f"sqlite:///{run.folder.parent}/mlflow.db")
        experiment = self.client.get_experiment_by_name(PROJECT)
        place = experiment.experiment_id if experiment else self.client.create_experiment(PROJECT)
        known = self.client.search_runs([place], f"tags.`dt_ray.run` = '{run}'", max_results=1) if step else []
        if known:
            self.run_id = known[0].info.run_id
            return
        self.run_id = self.client.create_run(place, run_name=config.name, tags={"dt_ray.run": str(run)}).info.run_id
        for name, value in _flat(to_plain(config)).items():
            self.client.log_param(self.run_id, name, value)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.client.log_metric(self.run_id, name, value, step=step)

    def close(self) -> None:
        self.client.set_terminated(self.run_id)


class WandbTracker:
    """A run of the project `dt_ray` of Weights & Biases; WANDB_MODE=offline keeps it in the run's folder."""

    def __init__(self, config: RunConfig, run: RunFolder, *, step: int) -> None:
        import wandb

        os.makedirs(str(run.folder), exist_ok=True)
        self.run = wandb.init(
            project=PROJECT,
            name=config.name,
            id=hashlib.sha256(str(run).encode()).hexdigest()[:16],
            resume="allow" if step else None,
            config=to_plain(config),
            dir=str(run.folder),
            settings=wandb.Settings(silent=True, console="off"),
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        # By a name of our own: W&B's step only goes up, and evaluations end after later updates.
        self.run.log({"update": step, **values})

    def close(self) -> None:
        self.run.finish()


class SafeTracker:
    """A tracker in a thread of its own. After a failure, one warning is logged and the tracker is no longer used."""

    def __init__(self, name: str, make: Callable[[], Tracker]) -> None:
        self.name, self._tracker = name, None
        self._has_failed = False
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)
        self._thread.submit(self._guarded, lambda: self._make(make))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._thread.submit(self._guarded, lambda: self._open.log(step, values))

    def close(self) -> None:
        self._thread.submit(self._guarded, lambda: self._open.close())
        self._thread.shutdown()

    def _make(self, make: Callable[[], Tracker]) -> None:
        self._tracker = make()

    @property
    def _open(self) -> Tracker:
        assert self._tracker is not None, "it has failed before"
        return self._tracker

    def _guarded(self, work: Callable[[], None]) -> None:
        if self._has_failed:
            return
        try:
            work()
        except Exception as error:  # whatever the tracker's library raises
            self._has_failed = True
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            log.warning("the tracker %s failed, and the run goes on without it: %s", self.name, reason)


TRACKERS: dict[str, Callable[..., Tracker]] = {
    "tensorboard": TensorBoardTracker,
    "mlflow": MLflowTracker,
    "wandb": WandbTracker,
}


def check_trackers(config: RunConfig) -> None:
    """Raises:
    ConfigError: a tracker's package is not installed, or it can't write where the run is.
    """
    for name in config.logging.trackers:
        if importlib.util.find_spec(PACKAGES[name]) is None:
            raise ConfigError(f'logging.trackers: {name} is not installed: pip install "dt-ray[{name}]"')
    here = set(config.logging.trackers) - ({"mlflow"} if MLFLOW_URI in os.environ else set())
    if here and not RunFolder.of(config).folder.is_local:
        raise ConfigError(
            f"logging.trackers: {', '.join(sorted(here))} would write to a local folder, and the run is at "
            f"{config.storage_path}; for mlflow set {MLFLOW_URI}"
        )


def make_trackers(config: RunConfig, run: RunFolder, *, step: int) -> list[Tracker]:
    """The trackers that the configuration names; `step` is the update that the run goes on from."""
    return [SafeTracker(name, partial(TRACKERS[name], config, run, step=step)) for name in config.logging.trackers]


def evaluation_values(report: EvaluationReport) -> dict[str, float]:
    """The values of an evaluation that trackers get, by name."""
    if report.held_out is not None:
        return {"evaluation/action_error": report.held_out.action_error}
    return {f"evaluation/return_mean/{target:g}": mean for target, mean in report.return_means.items()}


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in tree.items():
        values |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return values

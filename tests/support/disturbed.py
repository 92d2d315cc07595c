"""Runs whose processes are killed at chosen moments, so that a fault strikes there however busy the machine is."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from torch import Tensor

from dt_ray.config.schema import RunConfig
from dt_ray.data.spaces import SpaceSpec
from dt_ray.learners.decision_transformer import DecisionTransformerLearner
from dt_ray.losses import Metrics
from dt_ray.models.batch import WindowBatch
from support.processes import kill

ITSELF = "itself"
ALGORITHM = "support.disturbed:DisturbedLearner"


def plan_fault(config: RunConfig, *, at: int, kills: str = ITSELF) -> Path:
    """Has the next run on this data kill a process once, before update `at + 1`; the file is gone when it happened."""
    fault = _fault(config, at)
    fault.write_text(kills)
    return fault


def _fault(config: RunConfig, step: int) -> Path:
    return Path(config.data.path).parent / f"fault-{step}"


class DisturbedLearner(DecisionTransformerLearner):
    def update(self, batch: WindowBatch, *, num_real: Tensor | None = None) -> Metrics:
        with suppress(FileNotFoundError):
            fault = _fault(self.config, self.step)
            victim = fault.read_text()
            fault.unlink()
            os.kill(os.getpid(), signal.SIGKILL) if victim == ITSELF else kill(victim)
        return super().update(batch, num_real=num_real)


@dataclass(frozen=True, kw_only=True)
class DisturbedSpec(SpaceSpec):
    """Kills the first task of Ray that it is sent to; the file is gone when that happened."""

    fault: Path

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if ray.get_runtime_context().worker.mode == ray.WORKER_MODE:
            with suppress(FileNotFoundError):
                self.fault.unlink()
                os.kill(os.getpid(), signal.SIGKILL)


class CrashingLearner(DecisionTransformerLearner):
    def update(self, batch: WindowBatch, *, num_real: Tensor | None = None) -> Metrics:
        if self.step == 7 and self.config.model.width == 8:
            raise ZeroDivisionError("crashed at update 7")
        return super().update(batch, num_real=num_real)

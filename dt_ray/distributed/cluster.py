"""Connecting to Ray: the cluster that is there, or one for this process on this machine."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import ray
from ray.exceptions import RayTaskError

from dt_ray.config import RunConfig
from dt_ray.distributed.resources import ResourcePlan, plan_resources
from dt_ray.errors import UserError

# Set before Ray starts; what the user has set stays.
SETTINGS = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # ray.train.report() waits for a poll: 2 s by default
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20",  # how long CPUs that a lost node had are waited for
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # what Ray 2.60 warns will be the default
}
LOCAL_SETTINGS = {
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # one machine is not preempted without this process
    "RAY_USAGE_STATS_ENABLED": "0",
}
NOISY_LOGGERS = ("ray", "ray.data", "ray.train", "ray.tune", "ray._private.worker")


@contextmanager
def connection(*, verbose: bool = False) -> Iterator[None]:
    """Joins the cluster of `RAY_ADDRESS`, or one joined already; else starts one here and ends it afterwards."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    joins = "RAY_ADDRESS" in os.environ
    if not joins:
        for name, value in LOCAL_SETTINGS.items():
            os.environ.setdefault(name, value)
    if ray.is_initialized():
        yield
        return
    with quiet(verbose):
        options = {"log_to_driver": verbose, "logging_level": logging.INFO if verbose else logging.ERROR}
        if not joins:
            options |= {"address": "local", "include_dashboard": False}
        ray.init(**options)
        try:
            yield
        finally:
            ray.shutdown()


def plan_on_cluster(config: RunConfig) -> ResourcePlan:
    """The run's share of the cluster that is joined."""
    there = ray.cluster_resources()
    return plan_resources(config, cpus=there.get("CPU", 0), gpus=there.get("GPU", 0))


@contextmanager
def quiet(verbose: bool) -> Iterator[None]:
    """Keeps Ray's own log lines and deprecation warnings off the terminal, unless they are asked for."""
    if verbose:
        yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        levels = {name: logging.getLogger(name).level for name in NOISY_LOGGERS}
        for name in NOISY_LOGGERS:
            logging.getLogger(name).setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)


@contextmanager
def user_errors() -> Iterator[None]:
    """Raises the `UserError` that a task ended with as itself, not as Ray's report on it."""
    try:
        yield
    except Exception as error:
        cause = find_user_error(error)
        if cause is None:
            raise
        raise cause from None


def find_user_error(error: BaseException | None) -> UserError | None:
    """The first `UserError` among an exception's causes."""
    while error is not None:
        if isinstance(error, UserError) and not isinstance(error, RayTaskError):
            return error
        error = getattr(error, "cause", None) or error.__cause__ or error.__context__
    return None

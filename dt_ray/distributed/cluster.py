"""Connects to Ray: joins a running cluster, or starts one on this machine for this process."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import ray
from ray.exceptions import RayTaskError

from dt_ray.config.schema import RunConfig, ScalingConfig
from dt_ray.distributed.requests import release_requests
from dt_ray.distributed.resources import (
    ResourcePlan,
    TrialPlan,
    describe_plan,
    plan_resources,
    plan_trials,
    worker_bundles,
)
from dt_ray.distributed.room import Cluster, wait_for_room
from dt_ray.distributed.usage import cluster_nodes, describe_free
from dt_ray.errors import UserError

# Set before Ray starts, unless the user has set them.
SETTINGS = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # ray.train.report() waits for a poll: 2 s by default
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20",  # how long to wait for the CPUs of a lost node
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # what Ray 2.60 warns will be the default
}
LOCAL_SETTINGS = {
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # a single machine is not preempted without this process
    "RAY_USAGE_STATS_ENABLED": "0",
}
# Ray Train asks the dashboard whether its controller lives. Without a dashboard it would look for any cluster that is
# or was on this machine, wait for one that has ended, and remove workers whose controller is unknown there.
NO_DASHBOARD = {"RAY_API_SERVER_ADDRESS": "http://127.0.0.1:9"}
NOISY_LOGGERS = ("ray", "ray.data", "ray.train", "ray.tune", "ray._private.worker")


log = logging.getLogger("dt_ray")


@contextmanager
def connection(*, verbose: bool = False, dashboard: bool = False) -> Iterator[None]:
    """Joins the cluster of `RAY_ADDRESS`, or one joined already; else starts one here and ends it afterwards.

    `dashboard` starts Ray's dashboard with a cluster that is started here; the address of any is logged.
    """
    if ray.is_initialized():
        with environment(_unset(SETTINGS)):
            try:
                yield
            finally:
                release_requests()
        return
    joins = "RAY_ADDRESS" in os.environ
    settings = _unset(SETTINGS) if joins else _unset(SETTINGS | LOCAL_SETTINGS)
    if not joins and not dashboard:
        settings |= NO_DASHBOARD
    with quiet(verbose), environment(settings):
        options = {"log_to_driver": verbose, "logging_level": logging.INFO if verbose else logging.ERROR}
        if not joins:
            options |= {"address": "local", "include_dashboard": dashboard}
        if url := ray.init(**options).dashboard_url:
            log.info("Ray's dashboard: http://%s", url)
        try:
            yield
        finally:
            release_requests()
            ray.shutdown()


@contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Sets environment variables, which processes started meanwhile inherit."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _unset(settings: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in settings.items() if name not in os.environ}


def plan_on_cluster(config: RunConfig) -> ResourcePlan:
    """The run's share of what is free on the cluster; waits for `scaling.wait_for_nodes_s` where it is too little.

    Raises:
        ResourceError: the cluster has not enough, or others use it; the message says who.
    """

    scaling = config.scaling
    found = wait_for_room(
        lambda nodes: plan_resources(config, nodes),
        is_fair=lambda wanted, less: less.cpus_per_worker >= min(1.0, wanted.cpus_per_worker),
        cluster=Cluster(),
        wait_s=scaling.wait_for_nodes_s,
        bundles=worker_bundles(scaling),
    )
    return found.plan if found.note is None else replace(found.plan, notes=(*found.plan.notes, found.note))


def plan_trials_on_cluster(scaling: ScalingConfig, *, wanted: int) -> TrialPlan:
    """`plan_on_cluster` for a sweep, which waits for what one trial needs.

    Raises:
        ResourceError: as `plan_on_cluster`.
    """

    found = wait_for_room(
        lambda nodes: plan_trials(scaling, nodes, wanted=wanted),
        is_fair=lambda wanted, less: True,
        cluster=Cluster(),
        wait_s=scaling.wait_for_nodes_s,
        bundles=worker_bundles(scaling),
    )
    if found.note is not None:
        log.warning(found.note)
    return found.plan


def describe_on_cluster(config: RunConfig) -> dict[str, str]:
    """The resources that the run will ask of the joined cluster, in words.

    Raises:
        ResourceError: the cluster has not enough.
    """
    nodes = cluster_nodes()
    return describe_plan(plan_resources(config, nodes), config.scaling, nodes) | {"now": describe_free()}


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
    """Raises the `UserError` of a task itself instead of Ray's exception around it."""
    try:
        yield
    except Exception as error:
        cause = find_user_error(error)
        if cause is None:
            raise
        raise cause from None


def find_user_error(error: BaseException | None) -> UserError | None:
    """The first `UserError` among an exception's causes; None where there is none."""
    while error is not None:
        if isinstance(error, UserError) and not isinstance(error, RayTaskError):
            return error
        error = getattr(error, "cause", None) or error.__cause__ or error.__context__
    return None

"""Connecting to Ray: the cluster that is there, or one for this process on this machine."""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

import ray
import ray.autoscaler.sdk
from ray.exceptions import RayTaskError

from dt_ray.config import RunConfig, ScalingConfig
from dt_ray.distributed.resources import (
    ACCELERATOR,
    Node,
    ResourcePlan,
    TrialPlan,
    describe_plan,
    plan_resources,
    plan_trials,
    worker_bundles,
)
from dt_ray.errors import ResourceError, UserError

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
# Ray Train asks the dashboard whether its controller lives. Where there is none it would look for any cluster that is
# or was on this machine: it waits for one that is gone, and frees the workers of a controller that is unknown there.
NO_DASHBOARD = {"RAY_API_SERVER_ADDRESS": "http://127.0.0.1:9"}
LOOK_EVERY_S = 1.0  # seconds between two looks for new nodes
NOISY_LOGGERS = ("ray", "ray.data", "ray.train", "ray.tune", "ray._private.worker")


log = logging.getLogger("dt_ray")
T = TypeVar("T")


@contextmanager
def connection(*, verbose: bool = False, dashboard: bool = False) -> Iterator[None]:
    """Joins the cluster of `RAY_ADDRESS`, or one joined already; else starts one here and ends it afterwards.

    `dashboard` starts Ray's dashboard with a cluster that is started here; the address of any is logged.
    """
    if ray.is_initialized():
        with environment(_unset(SETTINGS)):
            yield
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
    """The run's share of the cluster that is joined; waits for `scaling.wait_for_nodes_s` where it has not enough.

    Raises:
        ResourceError: the cluster has not enough.
    """
    return _when_there_is_room(config.scaling, lambda: plan_resources(config, cluster_nodes()))


def plan_trials_on_cluster(scaling: ScalingConfig, *, wanted: int) -> TrialPlan:
    """`plan_on_cluster` for a sweep, which waits for the nodes that one trial needs.

    Raises:
        ResourceError: the cluster has not enough.
    """
    return _when_there_is_room(scaling, lambda: plan_trials(scaling, cluster_nodes(), wanted=wanted))


def _when_there_is_room(scaling: ScalingConfig, plan: Callable[[], T]) -> T:
    """The plan, as soon as it can be made of the nodes that an autoscaler starts."""
    deadline = time.monotonic() + scaling.wait_for_nodes_s
    try:
        return plan()
    except ResourceError as shortage:
        if not scaling.wait_for_nodes_s:
            raise
        log.info("waiting up to %g s for nodes: %s", scaling.wait_for_nodes_s, shortage)
    ray.autoscaler.sdk.request_resources(bundles=worker_bundles(scaling))
    try:
        while True:
            try:
                return plan()
            except ResourceError:
                if time.monotonic() > deadline:
                    raise
            time.sleep(LOOK_EVERY_S)
    finally:
        ray.autoscaler.sdk.request_resources(bundles=[])  # else it would keep them for ever


def cluster_nodes() -> list[Node]:
    """The nodes of the cluster that is joined."""
    return [_node(each["Resources"]) for each in ray.nodes() if each["Alive"]]


def _node(resources: Mapping[str, float]) -> Node:
    kinds = (name.removeprefix(ACCELERATOR) for name in resources if name.startswith(ACCELERATOR))
    return Node(cpus=resources.get("CPU", 0), gpus=resources.get("GPU", 0), accelerators=frozenset(kinds))


def describe_on_cluster(config: RunConfig) -> dict[str, str]:
    """What the run will ask of the cluster that is joined.

    Raises:
        ResourceError: the cluster has not enough.
    """
    nodes = cluster_nodes()
    return describe_plan(plan_resources(config, nodes), config.scaling, nodes)


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

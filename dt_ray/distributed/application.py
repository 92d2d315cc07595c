"""An application on a Ray Serve that others may use too: it gets a free name and route, and removes only itself."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ray import serve
from ray.serve.context import _get_global_client

from dt_ray.errors import ResourceError


@dataclass(frozen=True, kw_only=True)
class Application:
    """A name and a route that no other application of the cluster has."""

    name: str
    route: str
    url: str


@contextmanager
def application(name: str, *, host: str, port: int) -> Iterator[Application]:
    """A free name and route on the cluster's Ray Serve, which is started if there is none.

    At the end the application of that name is deleted, and Ray Serve ended where it was started here and nobody else
    uses it.

    Raises:
        ResourceError: Ray Serve runs already, at another address.
    """
    running = _get_global_client(raise_if_no_controller_running=False)
    if running is None:
        serve.start(http_options={"host": host, "port": port})
    else:
        check_address(running.http_config, host=host, port=port)
    place = free_place(name, _routes(), f"http://{host}:{port}")
    try:
        yield place
    finally:
        serve.delete(place.name)
        if running is None and not _routes():
            serve.shutdown()


def check_address(http: Any, *, host: str, port: int) -> None:
    """Raises:
    ResourceError: Ray Serve listens at another address, which can't be changed while it runs.
    """
    if (http.host, http.port) != (host, port):
        raise ResourceError(
            f"Ray Serve runs on this cluster already, at http://{http.host}:{http.port}, and not at "
            f"http://{host}:{port}; to serve there: --host {http.host} --port {http.port}"
        )


def free_place(name: str, routes: dict[str, str], address: str) -> Application:
    """`name`, or `name-2` and so on where that is taken; the root, or a route by that name where that is taken."""
    names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
    free = next(each for each in names if each not in routes and f"/{each}" not in routes.values())
    route = "/" if "/" not in routes.values() else f"/{free}"
    return Application(name=free, route=route, url=address + route.rstrip("/"))


def _routes() -> dict[str, str]:
    """The routes of all applications, by their names."""
    client = _get_global_client()
    assert client is not None
    applications = client.get_serve_details()["applications"]
    return {name: details["route_prefix"] for name, details in applications.items()}

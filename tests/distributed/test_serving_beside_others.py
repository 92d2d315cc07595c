"""Ray Serve on a cluster that others serve on too."""

import urllib.request
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray import serve
from support.examples import free_port

from dt_ray.distributed.application import application, check_address, free_place
from dt_ray.errors import ResourceError

NAMES = st.sampled_from(["policy", "policy-2", "policy-3", "other"])


@pytest.mark.ray
@given(taken=st.dictionaries(NAMES, st.sampled_from(["/", "/policy", "/policy-2", "/other"])))
def test_a_name_and_a_route_are_nobody_elses(taken: dict[str, str]) -> None:
    place = free_place("policy", taken, "http://127.0.0.1:8000")
    assert place.name not in taken
    assert place.route not in taken.values()
    assert place.url == "http://127.0.0.1:8000" + place.route.rstrip("/")


@pytest.mark.ray
@pytest.mark.parametrize(("host", "port"), [("0.0.0.0", 8000), ("127.0.0.1", 9000)])
def test_another_address_than_the_one_that_is_true_is_refused(host: str, port: int) -> None:
    running = SimpleNamespace(host=host, port=port)
    check_address(running, host=host, port=port)
    with pytest.raises(ResourceError, match=f"--host {host} --port {port}"):
        check_address(running, host="127.0.0.1", port=8000)


@serve.deployment(ray_actor_options={"num_cpus": 0})
class Says:
    def __init__(self, text: str) -> None:
        self.text = text

    def __call__(self, request: object) -> str:
        return self.text


def read(url: str) -> str:
    with urllib.request.urlopen(url) as response:
        return response.read().decode()


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_only_what_was_started_here_is_ended() -> None:
    port = free_port()
    at = {"host": "127.0.0.1", "port": port}
    try:
        with application("policy", **at) as ours:
            serve.run(Says.bind("ours"), name=ours.name, route_prefix=ours.route)
            assert read(ours.url) == "ours"
            serve.run(Says.bind("other"), name="other", route_prefix="/other")
        assert read(f"http://127.0.0.1:{port}/other") == "other"  # who came later is there
        with application("other", **at) as ours:
            serve.run(Says.bind("ours"), name=ours.name, route_prefix=ours.route)
            assert (ours.name, read(ours.url)) == ("other-2", "ours")
        assert read(f"http://127.0.0.1:{port}/other") == "other"
        assert set(serve.status().applications) == {"other"}
        with pytest.raises(ResourceError, match=f"--port {port}"), application("policy", host="127.0.0.1", port=1):
            pass
    finally:
        serve.shutdown()

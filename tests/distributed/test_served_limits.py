"""One session's end, or one bad request, touches nobody else; what is too long is not read."""

import asyncio
import json
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvicorn
from hypothesis import given, settings
from hypothesis import strategies as st
from support.examples import free_port, make_episodes
from support.processes import WAIT_S, wait_until

from dt_ray.config.schema import ModelConfig, RunConfig
from dt_ray.data.normalizer import Normalizer
from dt_ray.data.spaces import SpaceSpec
from dt_ray.distributed import request_limits
from dt_ray.distributed.request_limits import Gate
from dt_ray.jobs.training import start_run
from dt_ray.learners import LEARNERS
from dt_ray.play.sessions import RefusedError, Sessions

SPEC = SpaceSpec(observation_dim=3, action_dim=1, action_low=(-2.0,), action_high=(2.0,))


def make_sessions(**options: Any) -> Sessions:
    config = RunConfig(model=ModelConfig(context_length=4, num_layers=1, width=16, max_timesteps=60))
    learner = LEARNERS["decision_transformer"](config, SPEC, Normalizer.fit(make_episodes([30] * 4), SPEC))
    return Sessions(learner.policy(), SPEC, **options)


@settings(max_examples=20)
@given(st.sets(st.integers(0, 3)), st.booleans())
def test_sessions_that_end_within_a_batch_end_alone(ended: set[int], are_dropped: bool) -> None:
    """They had observed a step, and were gone when the batch came."""
    now = [0.0]
    sessions, undisturbed = make_sessions(idle_s=10, clock=lambda: now[0]), make_sessions()
    names = [sessions.start([i, 0, 0], -100.0 * i) for i in range(4)]
    others = [undisturbed.start([i, 0, 0], -100.0 * i) for i in range(4)]
    sessions.act(names)
    undisturbed.act(others)
    for i in range(4):
        now[0] = 0.0 if i in ended else 5.0
        sessions.observe(names[i], [i, 1, 0], -1)
        undisturbed.observe(others[i], [i, 1, 0], -1)
    if are_dropped:
        now[0] = 12.0
        sessions.drop_idle()
    else:
        for i in ended:
            sessions.end(names[i])
    found, expected = sessions.act(names), undisturbed.act(others)
    for i in range(4):
        if i in ended:
            assert isinstance(outcome := found[i], RefusedError)
            assert outcome.status == 404
        else:
            np.testing.assert_allclose(found[i], expected[i], atol=1e-5)  # type: ignore[arg-type]
    for i in set(range(4)) - ended:
        sessions.observe(names[i], [i, 2, 0], -1)
        assert not isinstance(sessions.act([names[i]])[0], RefusedError)


def test_a_session_that_is_stepped_is_not_idle() -> None:
    now = [0.0]
    sessions = make_sessions(idle_s=10, clock=lambda: now[0])
    name = sessions.start([1, 0, 0], -100)
    sessions.act([name])
    now[0] = 9.9
    sessions.observe(name, [1, 0, 0], 0)
    now[0] = 10.1  # its batch comes after another request has dropped the idle ones
    sessions.drop_idle()
    assert not isinstance(sessions.act([name])[0], RefusedError)


@pytest.mark.parametrize(
    "observation", [[1.0] * 200_000, [float("nan")] * 3, [1e39, 0, 0], ["x", 0, 0], [10**400, 0, 0]]
)
def test_a_refusal_is_short(observation: list[Any]) -> None:
    sessions = make_sessions()
    with pytest.raises(RefusedError) as error:
        sessions.start(observation, -100)
    assert error.value.status == 422
    assert len(error.value.reason) < 100


def answer(body: list[bytes], headers: dict[str, str]) -> tuple[int, int]:
    """The status of a request in so many parts, and the parts that were taken."""
    parts, taken, statuses = list(body), [0], []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        received = (await receive())["body"]
        assert received == b"".join(body)
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def receive() -> dict[str, Any]:
        taken[0] += 1
        part = parts.pop(0)
        return {"type": "http.request", "body": part, "more_body": bool(parts)}

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    coded = [(name.encode(), value.encode()) for name, value in headers.items()]
    asyncio.run(Gate(app)({"type": "http", "headers": coded}, receive, send))
    (status,) = statuses
    return status, taken[0]


def test_a_body_that_is_too_long_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_limits, "limits", request_limits.Limits())
    request_limits.limits.set_for(4, token=None)
    most = request_limits.limits.max_bytes
    assert answer([b"x" * 10], {"content-length": "10"}) == (200, 1)
    assert answer([b"x" * most], {}) == (200, 1)
    assert answer([b"x"], {"content-length": str(most + 1)}) == (413, 1)
    assert answer([b"x"], {"content-length": "9" * 5000}) == (413, 1)
    assert answer([b"x"], {"content-length": "many"}) == (413, 1)
    assert answer([b"x" * most, b"x", b"x" * 10**6], {"content-length": "10"}) == (413, 3)
    endless = [b"x" * 2**20] * 100
    assert answer(endless, {}) == (413, 1 + request_limits.MAX_DROPPED_BYTES // 2**20)


def test_a_client_that_is_still_sending_gets_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """And no reset connection, which is what it gets where a server ends one with something unread."""
    monkeypatch.setattr(request_limits, "limits", request_limits.Limits(token="open"))
    server = uvicorn.Server(uvicorn.Config(Gate(None), host="127.0.0.1", port=free_port(), log_level="critical"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_until(lambda: server.started)
        for token, status in (("open", 413), ("wrong", 401)):
            with socket.create_connection(("127.0.0.1", server.config.port)) as client:
                head = f"POST / HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\nContent-Length: {2**22}\r\n\r\n"
                client.sendall(head.encode())
                for _ in range(64):
                    client.sendall(b"x" * 2**16)
                assert client.recv(1000).startswith(f"HTTP/1.1 {status}".encode())
    finally:
        server.should_exit = True
        thread.join()


def test_a_token_is_wanted_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_limits, "limits", request_limits.Limits())
    request_limits.limits.set_for(4, token="sésame")
    assert answer([b""], {}) == (401, 1)
    assert answer([b""], {"authorization": "Bearer sesame"}) == (401, 1)
    assert answer([b""], {"authorization": "Bearer sésame"}) == (200, 1)


def request(url: str, method: str, body: bytes | None, token: str) -> tuple[int, bytes]:
    headers = {"content-type": "application/json", "authorization": f"Bearer {token}"}
    call = urllib.request.Request(url, data=body, method=method, headers=headers)
    try:
        with urllib.request.urlopen(call, timeout=WAIT_S) as answered:
            return answered.status, answered.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


@pytest.mark.nightly
def test_a_server_keeps_its_limits(tiny_config: RunConfig, tmp_path: Path) -> None:
    run = start_run(replace(tiny_config, total_timesteps=4)).run
    url = f"http://127.0.0.1:{(port := free_port())}"
    command = [sys.executable, "-m", "dt_ray.serve", run, "--port", str(port), "--token", "open"]
    server = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    try:

        def answers() -> bool:
            assert server.poll() is None, server.stderr and server.stderr.read()
            with suppress(OSError):
                return request(url, "GET", None, "open")[0] == 200
            return False

        wait_until(answers, what="the server does not answer")
        first = {"observation": [1, 0, 0], "target_return": -100}
        assert request(f"{url}/sessions", "POST", json.dumps(first).encode(), "wrong")[0] == 401
        assert request(f"{url}/sessions", "POST", json.dumps(first).encode(), "open")[0] == 200
        for status, body in (
            (413, b'{"observation": [' + b"1," * 100_000 + b'1], "target_return": 0}'),
            (422, b'{"observation": [NaN, 0, 0], "target_return": 0}'),
            (422, b'{"observation": [1, 0, 0], "target_return": NaN}'),
            (422, b'{"observation": "NaN", "target_return": NaN}'),
            (422, b'{"observation": [' + b"1," * 1000 + b'1], "target_return": 0}'),
            (422, b'{"observation": [' + b'"x",' * 500 + b'1], "target_return": 0}'),
        ):
            found, answered = request(f"{url}/sessions", "POST", body, "open")
            assert (found, len(answered) < 300) == (status, True), answered[:500]
    finally:
        server.send_signal(signal.SIGINT)
        _, errors = server.communicate(timeout=WAIT_S)
    assert "Traceback" not in errors

"""A served policy: every session is answered as a policy that plays its episode alone."""

import contextlib
import json
import math
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.examples import free_port
from support.processes import WAIT_S, wait_until
from support.reports import make_offline_report
from support.trained import MODELS, trained

from dt_ray.config.schema import RunConfig
from dt_ray.play.sessions import RefusedError, Sessions
from dt_ray.runs.checkpoint import load_policy
from dt_ray.runs.folder import RunFolder, checkpoint_at
from dt_ray.runs.storage import Folder

ALGORITHMS = [*MODELS, "iql", "behavior_cloning"]


def sessions_of(tiny_config: RunConfig, kind: str, **options: Any) -> tuple[Sessions, Any]:
    algorithm = kind if kind not in MODELS else "decision_transformer"
    place = checkpoint_at(Folder.at(trained(tiny_config, MODELS.get(kind, tiny_config.model), algorithm)))
    policy, facts = load_policy(place)
    return Sessions(policy, facts.spec, **options), load_policy(place)[0]


@pytest.mark.parametrize("kind", ALGORITHMS)
def test_sessions_that_step_in_any_order_act_as_if_alone(tiny_config: RunConfig, kind: str) -> None:
    """Three episodes, asked for other returns, some of them steps ahead of others, batched as they come."""
    sessions, policy = sessions_of(tiny_config, kind)
    generator = np.random.default_rng(0)
    seen = generator.normal(size=(3, 12, 3)).astype(np.float32)
    rewards = generator.normal(size=(3, 12))
    targets = [-100.0, -300.0, 50.0 if kind != "head" else math.inf]
    expected = []
    for episode in range(3):
        policy.start(seen[episode, :1], np.array([targets[episode]]))
        actions = [policy.act()[0]]
        for step in range(1, 12):
            policy.observe(actions[-1][None], rewards[episode, step : step + 1], seen[episode, step : step + 1])
            actions.append(policy.act()[0])
        expected.append(actions)
    names = [sessions.start(seen[i, 0], targets[i]) for i in range(3)]
    found: list[list[np.ndarray]] = [[action] for action in sessions.act(names)]
    while min(map(len, found)) < 12:
        ready = [i for i in range(3) if len(found[i]) < 12 and generator.random() < 0.6]
        for i in ready:
            sessions.observe(names[i], seen[i, len(found[i])], rewards[i, len(found[i])])
        if ready:
            for i, action in zip(ready, sessions.act([names[i] for i in ready]), strict=True):
                found[i].append(action)
    np.testing.assert_allclose(np.array(found), np.array(expected), atol=1e-4)


def test_a_bad_request_is_refused_and_hurts_no_session(tiny_config: RunConfig) -> None:
    now = [0.0]
    sessions, _ = sessions_of(tiny_config, "step", max_sessions=2, idle_s=10, clock=lambda: now[0])
    first = sessions.start([1, 0, 0], -100)
    before = sessions.act([first])
    for status, call in (
        (422, lambda: sessions.start([1, 0], -100)),
        (422, lambda: sessions.start([1, 0, float("nan")], -100)),
        (422, lambda: sessions.start([1, 0, 0], float("inf"))),
        (404, lambda: sessions.observe("nobody", [1, 0, 0], 0)),
        (422, lambda: sessions.observe(first, [1, 0, 0, 0], 0)),
        (422, lambda: sessions.observe(first, [1, 0, 0], float("nan"))),
        (422, lambda: sessions.observe(first, [1, 0, 0], 0, [1, 2])),
    ):
        with pytest.raises(RefusedError) as error:
            call()
        assert error.value.status == status
    np.testing.assert_array_equal(sessions.act([first]), before)
    sessions.start([1, 0, 0], -100)
    with pytest.raises(RefusedError) as error:
        sessions.start([1, 0, 0], -100)
    assert error.value.status == 503
    now[0] = 9.0
    sessions.act([first])
    now[0] = 15.0
    third = sessions.start([1, 0, 0], -100)  # the second was idle for too long
    assert len(sessions) == 2
    sessions.act([third])
    sessions.end(third)
    with pytest.raises(RefusedError):
        sessions.end(third)


def test_an_episode_longer_than_the_policy_knows_is_refused(tiny_config: RunConfig) -> None:
    sessions, _ = sessions_of(tiny_config, "step")
    name = sessions.start([1, 0, 0], -100)
    for _ in range(59):
        sessions.act([name])
        sessions.observe(name, [1, 0, 0], -1)
    sessions.act([name])
    with pytest.raises(RefusedError, match="up to 60 steps"):
        sessions.observe(name, [1, 0, 0], -1)


def request(url: str, method: str = "GET", body: Any = None) -> tuple[int, Any]:
    data = None if body is None else (body if isinstance(body, bytes) else json.dumps(body).encode())
    call = urllib.request.Request(url, data=data, method=method, headers={"content-type": "application/json"})
    try:
        with urllib.request.urlopen(call, timeout=WAIT_S) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read() or b"null")


@pytest.mark.slow
def test_a_policy_is_served_over_http(tiny_config: RunConfig, tmp_path: Path) -> None:
    run = trained(tiny_config, MODELS["step"])
    RunFolder(Folder.at(run)).write_offline(make_offline_report(step=4, best_target=-100.0, supported=(-900.0, -50.0)))
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    server = subprocess.Popen(
        [sys.executable, "-m", "dt_ray.serve", run, "--port", str(port), "--max-sessions", "3", "--clip"],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        facts: dict[str, Any] = {}

        def answers() -> bool:
            assert server.poll() is None, server.stderr and server.stderr.read()
            with contextlib.suppress(urllib.error.URLError, ConnectionError, ValueError):  # Serve's own page, at first
                status, body = request(url)
                facts.update(body if status == 200 else {})
            return bool(facts)

        wait_until(answers)
        assert facts == {"env_id": "Pendulum-v1", "algorithm": "decision_transformer", "step": 4, "sessions": 0}
        policy, _ = load_policy(checkpoint_at(Folder.at(run)))
        seen = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
        policy.start(seen[:1], np.array([-100.0]))
        status, started = request(f"{url}/sessions", "POST", {"observation": seen[0].tolist(), "target_return": -100})
        assert status == 200
        actions, expected = [started["action"]], [policy.act()[0]]
        step_url = f"{url}/sessions/{started['session']}/step"
        for step in range(1, 6):
            assert request(step_url, "POST", {"observation": [1], "reward": 0})[0] == 422
            assert request(step_url, "POST", b"{")[0] == 422
            status, answer = request(step_url, "POST", {"observation": seen[step].tolist(), "reward": -1.5})
            assert status == 200
            actions.append(answer["action"])
            policy.observe(expected[-1][None], np.array([-1.5]), seen[step : step + 1])
            expected.append(policy.act()[0])
        np.testing.assert_allclose(actions, expected, atol=1e-4)
        assert request(f"{url}/sessions/nobody/step", "POST", {"observation": [1, 0, 0], "reward": 0})[0] == 404
        more = [request(f"{url}/sessions", "POST", {"observation": [1, 0, 0], "target_return": 0})[0] for _ in range(3)]
        assert more == [200, 200, 503]
        assert request(f"{url}/sessions/{started['session']}", "DELETE")[0] == 200
        first = {"observation": seen[0].tolist()}
        status, recommended = request(f"{url}/sessions", "POST", first)
        assert status == 200
        assert "warning" not in recommended
        assert recommended["target_return"] == -100.0
        assert "asked_target_return" not in recommended
        np.testing.assert_allclose(recommended["action"], actions[0], atol=1e-4)
        assert request(f"{url}/sessions/{recommended['session']}", "DELETE")[0] == 200
        status, beyond = request(f"{url}/sessions", "POST", {**first, "target_return": 5000})
        assert status == 200
        assert "outside of -900 .. -50" in beyond["warning"]
        assert (beyond["target_return"], beyond["asked_target_return"]) == (-50.0, 5000.0)
        assert request(f"{url}/sessions", "POST", {**first, "target_return": "most"})[0] == 422
    finally:
        server.send_signal(signal.SIGINT)
        _, errors = server.communicate(timeout=WAIT_S)
    assert server.returncode == 130, errors
    assert "Traceback" not in errors

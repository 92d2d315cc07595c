"""Serves a policy over HTTP with Ray Serve: one replica holds all sessions and steps those that arrive together."""

import logging
import time
from collections.abc import Callable
from typing import Any, Literal

import torch
from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from ray import serve

from dt_ray.config.modules import allow_modules, allowed_modules
from dt_ray.config.targets import AUTO, TargetReturn, as_json
from dt_ray.distributed import request_limits
from dt_ray.distributed.application import application
from dt_ray.errors import RunError
from dt_ray.play.sessions import RefusedError, Sessions
from dt_ray.runs.checkpoint import load_policy
from dt_ray.runs.recommendations import check_target, estimates_beside, needed_estimates, recommended_target
from dt_ray.runs.storage import Folder

# No `from __future__ import annotations` here: FastAPI reads the annotations of the methods below.

log = logging.getLogger("dt_ray")

MAX_BATCH = 256
BATCH_WAIT_S = 0.002
MAX_PLACE = 100  # characters of where a fault is

app = FastAPI(title="dt_ray policy")
app.add_middleware(request_limits.Gate)


@app.exception_handler(RequestValidationError)
async def say_what_is_wrong(request: Request, error: RequestValidationError) -> JSONResponse:
    """The first fault and its place, without what was sent."""
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"][1:])[:MAX_PLACE]
    return JSONResponse({"detail": f"{place}: {first['msg']}" if place else first["msg"]}, status_code=422)


class Start(BaseModel, extra="forbid"):
    """The first observation of an episode, and the return that it is asked for: by itself what is recommended."""

    observation: list[float]
    target_return: TargetReturn | Literal["auto"] = AUTO


class Step(BaseModel, extra="forbid"):
    """The reward of the last action, the next observation, and the action taken if it was another one."""

    observation: list[float]
    reward: float
    action: list[float] | None = Field(default=None)


# Defined before the class: where Ray Serve decorates the class, its methods see only what is defined by then.
def _or_refuse(work: Callable[[], Any]) -> Any:
    try:
        return work()
    except RefusedError as error:
        raise HTTPException(error.status, error.reason) from None


def _action_of(outcome: list[float] | RefusedError) -> list[float]:
    if isinstance(outcome, RefusedError):
        raise HTTPException(outcome.status, outcome.reason)
    return outcome


@serve.deployment(ray_actor_options={"num_cpus": 1}, max_ongoing_requests=4 * MAX_BATCH)
@serve.ingress(app)
class PolicyServer:
    """Sessions of one policy."""

    def __init__(
        self,
        checkpoint: str,
        *,
        max_sessions: int,
        idle_s: float,
        clip: bool = False,
        token: str | None = None,
        modules: tuple[str, ...] = (),
    ) -> None:
        torch.set_num_threads(1)
        allow_modules(*modules)
        policy, facts = load_policy(Folder(checkpoint))
        request_limits.limits.set_for(facts.spec.observation_dim + facts.spec.action_dim, token=token)
        self.facts = {"env_id": facts.env_id, "algorithm": facts.algorithm, "step": facts.step}
        self.sessions = Sessions(policy, facts.spec, max_sessions=max_sessions, idle_s=idle_s)
        self.place, self.clip = Folder(checkpoint), clip
        self.estimates = needed_estimates(self.place, "clip") if clip else estimates_beside(self.place)

    @app.get("/")
    async def describe(self) -> dict[str, Any]:
        self.sessions.drop_idle()
        return {**self.facts, "sessions": len(self.sessions)}

    @app.post("/sessions")
    async def start(self, request: Start) -> dict[str, Any]:
        target = check_target(_or_refuse(lambda: self.target_of(request)), self.estimates, clip=self.clip)
        name = _or_refuse(lambda: self.sessions.start(request.observation, target.used))
        answer = {"session": name, "action": _action_of(await self.act(name)), "target_return": as_json(target.used)}
        if target.used != target.asked:
            answer["asked_target_return"] = as_json(target.asked)
        return answer if target.warning is None else {**answer, "warning": target.warning}

    @app.post("/sessions/{name}/step")
    async def step(self, name: str, request: Step) -> dict[str, Any]:
        _or_refuse(lambda: self.sessions.observe(name, request.observation, request.reward, request.action))
        return {"action": _action_of(await self.act(name))}

    @app.delete("/sessions/{name}")
    async def end(self, name: str) -> dict[str, Any]:
        _or_refuse(lambda: self.sessions.end(name))
        return {}

    def target_of(self, request: Start) -> float:
        """Raises:
        RefusedError: it is `auto`, and nothing was estimated, or nothing that can be believed.
        """
        if request.target_return != AUTO:
            return request.target_return
        try:
            return recommended_target(self.place)
        except RunError as error:
            raise RefusedError(422, str(error)) from None

    @serve.batch(max_batch_size=MAX_BATCH, batch_wait_timeout_s=BATCH_WAIT_S)
    async def act(self, names: list[str]) -> list[Any]:
        return [each if isinstance(each, RefusedError) else each.tolist() for each in self.sessions.act(names)]


def serve_policy(
    checkpoint: str,
    *,
    host: str,
    port: int,
    max_sessions: int,
    idle_s: float,
    clip: bool = False,
    token: str | None = None,
) -> None:
    """Serves until it is interrupted, on the cluster that is joined, beside what others serve there."""
    settings = {"max_sessions": max_sessions, "idle_s": idle_s, "clip": clip, "token": token}
    server = PolicyServer.bind(checkpoint, **settings, modules=allowed_modules())  # type: ignore[attr-defined]
    with application("policy", host=host, port=port) as place:
        serve.run(server, name=place.name, route_prefix=place.route)
        log.info("serving %s at %s", checkpoint, place.url)
        while True:
            time.sleep(3600)

"""Checks requests before a server reads them: their size, and the token where there is one."""

from __future__ import annotations

import hmac
import json
from dataclasses import dataclass
from typing import Any

BYTES_A_NUMBER = 64  # of JSON: more than any float needs
OTHER_BYTES = 4096
MAX_DROPPED_BYTES = 2**25  # of a body that is too long; after that the connection ends


@dataclass
class Limits:
    """Set by the server of this process when its policy is loaded."""

    max_bytes: int = OTHER_BYTES
    token: str | None = None

    def set_for(self, num_numbers: int, *, token: str | None) -> None:
        """For requests of so many numbers."""
        self.max_bytes = OTHER_BYTES + BYTES_A_NUMBER * num_numbers
        self.token = token


limits = Limits()


class Gate:
    """An ASGI middleware: 401 without the token, 413 for a body that is too long, which is dropped as it comes."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        if limits.token is not None:
            wanted = f"Bearer {limits.token}".encode()
            if not hmac.compare_digest(headers.get(b"authorization", b""), wanted):
                await _drop_body(receive)
                await _answer(send, 401, "this server wants the header Authorization: Bearer TOKEN")
                return
        too_long = f"a request here has at most {limits.max_bytes} bytes"
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length[:20]) > limits.max_bytes:
            await _drop_body(receive)
            await _answer(send, 413, too_long)
            return
        body = b""
        while True:  # a length that is not said, or not true
            message = await receive()
            if message["type"] != "http.request":
                return  # the client is gone
            body += message.get("body", b"")
            if len(body) > limits.max_bytes:
                if message.get("more_body", False):
                    await _drop_body(receive)
                await _answer(send, 413, too_long)
                return
            if not message.get("more_body", False):
                break
        is_read = False

        async def receive_whole() -> Any:
            nonlocal is_read
            if is_read:
                return await receive()
            is_read = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self.app(scope, receive_whole, send)


async def _drop_body(receive: Any) -> None:
    """Takes the rest of a body: a client that is still sending would see a reset connection instead of the answer."""
    num_bytes = 0
    while num_bytes < MAX_DROPPED_BYTES:
        message = await receive()
        if message["type"] != "http.request" or not message.get("more_body", False):
            return
        num_bytes += len(message.get("body", b""))


async def _answer(send: Any, status: int, reason: str) -> None:
    content = json.dumps({"detail": reason}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": content})

"""An S3 server on loopback that fails when it is told to."""

from __future__ import annotations

import logging
import socket
import sys
import threading
from collections.abc import Iterable
from typing import Any, Literal

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from pyarrow import fs
from werkzeug.serving import make_server

PLANTED = ("planted-key-id", "planted-secret")  # which no file of a run may hold


class ObjectStore:
    """Moto's server, with the bucket `bucket`; `environment` is what reaching it takes."""

    def __init__(self) -> None:
        logging.getLogger("werkzeug").setLevel(logging.CRITICAL)
        self._answer = DomainDispatcherApplication(create_backend_app)
        self._num_failures, self._how = 0, ""
        server = make_server("127.0.0.1", 0, self._serve, threaded=True)
        self.environment = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.port}",
            "AWS_ACCESS_KEY_ID": PLANTED[0],
            "AWS_SECRET_ACCESS_KEY": PLANTED[1],
            "AWS_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        threading.Thread(target=server.serve_forever, daemon=True, name="object store").start()
        fs.S3FileSystem(
            access_key=self.environment["AWS_ACCESS_KEY_ID"],
            secret_key=self.environment["AWS_SECRET_ACCESS_KEY"],
            region=self.environment["AWS_REGION"],
            endpoint_override=self.environment["AWS_ENDPOINT_URL"],
            allow_bucket_creation=True,
        ).create_dir("bucket")

    def fail(self, how: Literal["500", "drop"], *, num_requests: int = sys.maxsize) -> None:
        """From now on answers with an error, or closes the connection."""
        self._num_failures, self._how = num_requests, how

    def mend(self) -> None:
        """Answers again."""
        self._num_failures = 0

    @property
    def answers(self) -> bool:
        return self._num_failures == 0

    def _serve(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        if self.answers:
            return self._answer(environ, start_response)
        self._num_failures -= 1
        if self._how == "drop":
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
        start_response("500 Internal Server Error", [])
        return [b""]

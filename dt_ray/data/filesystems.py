"""The filesystem of a path or URI; requests to an object store are repeated for about three minutes."""

from __future__ import annotations

import os
from functools import cache

import pyarrow as pa
from pyarrow import fs

from dt_ray.errors import StorageError

S3_ATTEMPTS = 16  # about three minutes with the pauses between them; pyarrow's default of 3 gives up after six seconds


def reach(place: str) -> tuple[fs.FileSystem, str]:
    """The filesystem of an absolute local path or a URI, and the path on it.

    Raises:
        StorageError: no such filesystem, or a URI with settings or credentials in it.
    """
    scheme, separator, rest = place.partition("://")
    if not separator:
        return fs.LocalFileSystem(), place
    if "?" in rest or "@" in rest:
        raise StorageError(
            f"{scheme}://… holds settings or credentials, which would be written into the run: leave them out of the "
            f"URI and set AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or their like, instead"
        )
    authority, _, path = rest.partition("/")
    filesystem, root = _filesystem(scheme, authority)
    return filesystem, f"{root.rstrip('/')}/{path}"


@cache
def _filesystem(scheme: str, authority: str) -> tuple[fs.FileSystem, str]:
    """One for each bucket: each has connections and threads of its own."""
    try:
        filesystem, root = fs.FileSystem.from_uri(f"{scheme}://{authority}/")
    except (pa.ArrowException, OSError) as error:
        raise StorageError(f"can't reach {scheme}://{authority}: {error}") from None
    if isinstance(filesystem, fs.S3FileSystem):
        filesystem = fs.S3FileSystem(
            region=filesystem.region,
            endpoint_override=os.environ.get("AWS_ENDPOINT_URL"),
            retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=S3_ATTEMPTS),
        )
    return filesystem, root

"""Pickles of NumPy arrays and plain values, decoded by an allow-list: anything else is refused and nothing is run."""

from __future__ import annotations

import io
import pickle
from typing import Any

import numpy as np

from dt_ray.errors import DataError

ALLOWED = {
    "numpy": {"ndarray", "dtype"},
    "numpy.core.multiarray": {"_reconstruct", "scalar"},  # as NumPy 1 and 2 name the same functions
    "numpy._core.multiarray": {"_reconstruct", "scalar"},
    "numpy.core.numeric": {"_frombuffer"},
    "numpy._core.numeric": {"_frombuffer"},
    "_codecs": {"encode"},  # bytes in old protocols
    "collections": {"OrderedDict"},
}


class ArrayUnpickler(pickle.Unpickler):
    """Allows the functions that build arrays, and no others."""

    def find_class(self, module: str, name: str) -> Any:
        if name not in ALLOWED.get(module, ()):
            raise DataError(f"it holds {module}.{name}, which is not an array: pickles can run code, so it isn't read")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def load_arrays(content: bytes) -> Any:
    """The arrays, lists, dicts and plain values of a pickle.

    Raises:
        DataError: it holds anything else, or is damaged.
    """
    return _load(io.BytesIO(content))


def load_all(content: bytes) -> list[Any]:
    """The same for pickles that were written one after another.

    Raises:
        DataError: as `load_arrays`.
    """
    stream = io.BytesIO(content)
    values = [_load(stream)]
    while stream.tell() < len(content):
        values.append(_load(stream))
    return values


def _load(stream: io.BytesIO) -> Any:
    try:
        return ArrayUnpickler(stream).load()
    except DataError:
        raise
    except Exception as error:  # pickle raises other errors for each kind of damage
        raise DataError(f"it is no pickle of arrays: {error}") from None


def as_vector(value: Any) -> np.ndarray:
    """A decoded value as an array of float32."""
    return np.asarray(value, dtype=np.float32)

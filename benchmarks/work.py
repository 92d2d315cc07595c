"""The work that everyone is given: one model's size, one dataset, one environment, and how a rate is taken."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy import ndarray

CONTEXT, BATCH, NUM_LAYERS, NUM_HEADS, WIDTH, DROPOUT = 20, 64, 3, 1, 128, 0.1
STATE, ACTION = 11, 3  # of the training work
ENV_ID, ENV_STATE, ENV_ACTION, ENV_STEPS, TARGET = "Pendulum-v1", 3, 1, 200, -200.0
NUM_EPISODES, EPISODE_STEPS = 250, 1000  # as long as those of the field's usual datasets
LEARNING_RATE, WEIGHT_DECAY, GRADIENT_CLIP = 1e-4, 1e-4, 0.25

Measure = Callable[[], float]  # does some of the work and returns how much of it a second, or its seconds


@dataclass(frozen=True, kw_only=True)
class Episodes:
    """Random logged episodes of one length."""

    observations: ndarray  # [E, T, S] float32
    actions: ndarray  # [E, T, A] float32 in [-1, 1]
    rewards: ndarray  # [E, T] float32

    @classmethod
    def make(cls, num: int = NUM_EPISODES) -> Episodes:
        generator = np.random.default_rng(0)
        return cls(
            observations=generator.normal(size=(num, EPISODE_STEPS, STATE)).astype(np.float32),
            actions=generator.uniform(-1, 1, size=(num, EPISODE_STEPS, ACTION)).astype(np.float32),
            rewards=generator.normal(size=(num, EPISODE_STEPS)).astype(np.float32),
        )


@contextmanager
def watching(look: Callable[[], None], *, every_s: float) -> Iterator[None]:
    """Looks again and again, from a thread, while the block runs."""
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(every_s):
            look()

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        stop.set()
        watcher.join()


def rate(count: float, work: Callable[[], object]) -> float:
    """How many of `count` a second."""
    began = time.perf_counter()
    work()
    return count / (time.perf_counter() - began)


def repeated(count: int, work: Callable[[], object], *, each: float = 1.0) -> Measure:
    """A measure that does the work so many times, once before anything is timed."""
    work()

    def measure() -> float:
        def loop() -> None:
            for _ in range(count):
                work()

        return rate(count * each, loop)

    return measure

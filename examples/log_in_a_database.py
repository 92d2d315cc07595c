"""Trains on rows in a database, which Ray Data reads: `data.path=module:function`.

    python examples/log_in_a_database.py log.sqlite
    export LOG=$PWD/log.sqlite PYTHONPATH=examples
    python -m dt_ray.train data.path=log_in_a_database:read data.residency=dataset

Any function without arguments will do that returns a Ray Dataset: `ray.data.read_sql`, `read_delta`, `read_lance`, …,
and any operators behind it. Its rows are steps, in columns whose names `dt_ray` knows or is told by `data.columns`, or
whole episodes.
"""

from __future__ import annotations

import os
import sqlite3
import sys

import numpy as np
import ray.data
from write_machine_log import DAYS, NUM_BATCHES, play

COLUMNS = "day, batch, second, temperature, level, heater, valve, profit"
QUERY = """
    SELECT day || batch AS episode_id, second AS timestep, temperature AS obs_0, level AS obs_1,
           heater AS action_0, valve AS action_1, profit AS reward
    FROM steps WHERE temperature IS NOT NULL
"""


def main(place: str) -> None:
    """Writes the batches of some days in a machine hall into a table of steps."""
    random = np.random.default_rng(0)
    with sqlite3.connect(place) as database:
        database.execute(f"CREATE TABLE steps ({COLUMNS})")
        for day in DAYS:
            rows = [(day, batch, second, *numbers) for batch in range(1, NUM_BATCHES + 1)
                    for second, _, *numbers in play(batch, random)]  # fmt: skip
            database.executemany(f"INSERT INTO steps ({COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?)", rows)


def read() -> ray.data.Dataset:
    """The steps of the database that `LOG` names."""
    place = os.environ["LOG"]
    return ray.data.read_sql(QUERY, lambda: sqlite3.connect(place))


if __name__ == "__main__":
    main(sys.argv[1])

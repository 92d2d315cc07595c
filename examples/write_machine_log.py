"""Writes a log as the controller of a machine hall might: a CSV file a day, with an index, a clock and units.

    python examples/write_machine_log.py logs

Batches of a heated tank are brought to 60 °C by operators of different skill. Every file counts its batches from 1.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import numpy as np

DAYS, NUM_BATCHES, NUM_STEPS = ("monday", "tuesday", "wednesday"), 12, 40
HEADER = ("", "time [s]", "batch", "temperature [°C]", "level [m]", "heater [kW]", "valve [%]", "profit")


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    for day in DAYS:
        rows = [row for batch in range(1, NUM_BATCHES + 1) for row in play(batch, random)]
        with (folder / f"{day}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([HEADER, *([index, *row] for index, row in enumerate(rows))])


def play(batch: int, random: np.random.Generator) -> list[list[float]]:
    """One batch: its rows without the index."""
    temperature, level, skill = random.uniform(15, 30), random.uniform(0.4, 0.6), random.uniform(0, 1)
    rows = []
    for step in range(NUM_STEPS):
        heater = np.clip(skill * (60 - temperature) / 5 + (1 - skill) * random.uniform(0, 10), 0, 10)
        valve = np.clip(50 + skill * 200 * (0.5 - level) + (1 - skill) * random.uniform(-50, 50), 0, 100)
        profit = 1 - abs(temperature - 60) / 40 - 0.02 * heater
        numbers = (10 * step, batch, temperature, level, heater, valve, profit)
        rows.append([round(float(number), 3) for number in numbers])
        temperature += 0.8 * heater - 0.05 * (temperature - 20)
        level += 0.002 * (valve - 50) + random.normal(0, 0.005)
    return rows


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "logs"))

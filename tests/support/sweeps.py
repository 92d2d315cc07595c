"""A sweep that has run."""

from pathlib import Path

from dt_ray.config.loading import to_plain
from dt_ray.config.schema import RunConfig
from dt_ray.jobs.training import start_run
from dt_ray.sweeps.config import SweepConfig
from dt_ray.sweeps.folder import (
    SweepFolder,
)
from dt_ray.sweeps.loading import decode_sweep


def made_sweep(tiny_config: RunConfig, folder: Path, **axes: dict) -> tuple[SweepConfig, SweepFolder]:
    """A sweep whose trials were trained in this process."""
    config = to_plain(tiny_config) | {"name": "made", "storage_path": str(folder), "total_timesteps": 10}
    tree = {key.replace("__", "."): value for key, value in axes.items()}
    sweep = decode_sweep(tree | {"num_seeds": 2}, config, (), default_name="made")
    place = SweepFolder.of(sweep)
    place.create(sweep)
    for name, chosen in sweep.trials().items():
        start_run(sweep.run_config(name, chosen, storage_path=str(place.trials)))
    return sweep, place

"""The command `python -m dt_ray.data`: its manual and parsers are in `dt_ray.cli.data`."""

from dt_ray.cli.command import run_command
from dt_ray.cli.data import main

if __name__ == "__main__":
    run_command(main)

"""Command line of the phantom: `python -m custom.phantom make --output_dir DIR --subjects 40 --seed 0`."""

import logging
import sys

import fire
from custom.phantom.cohort import make
from custom.runs.command_line import check_flags

if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    commands = {"make": make}
    try:
        check_flags(commands)
    except ValueError as error:
        sys.exit(f"ERROR: {error}")
    fire.Fire(commands)

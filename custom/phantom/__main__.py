"""Command line of the phantom: `python -m custom.phantom make --output_dir DIR --subjects 40 --seed 0`."""

import logging

import fire
from custom.phantom.cohort import make

if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    fire.Fire({"make": make})

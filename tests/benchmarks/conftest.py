"""The benchmarks are scripts beside one another, no package: their folder must be where Python looks for modules."""

import sys

from helpers import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

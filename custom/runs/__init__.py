"""What surrounds every stage: files, folders, tracking, resuming, weights."""

from custom.runs.files import file_hash
from custom.runs.folders import RunFolder
from custom.runs.resuming import Resume, SeedEachEpoch
from custom.runs.tracking import tracking_store
from custom.runs.weights import KeepBest, KeepLast, LoadWeights, WeightAverage, existing_handler, load_pretrained

__all__ = [
    "KeepBest",
    "KeepLast",
    "LoadWeights",
    "Resume",
    "RunFolder",
    "SeedEachEpoch",
    "WeightAverage",
    "existing_handler",
    "file_hash",
    "load_pretrained",
    "tracking_store",
]

"""What surrounds every stage: files, folders, tracking, resuming, weights."""

from custom.runs.files import file_hash, file_hashes
from custom.runs.folders import claim_folder, lock_folder, unlock_folder
from custom.runs.resuming import Resume, SeedEachEpoch
from custom.runs.tracking import tracking_store
from custom.runs.weights import KeepBest, KeepLast, LoadWeights, WeightAverage, existing_handler, load_pretrained

__all__ = [
    "KeepBest",
    "KeepLast",
    "LoadWeights",
    "Resume",
    "SeedEachEpoch",
    "WeightAverage",
    "claim_folder",
    "existing_handler",
    "file_hash",
    "file_hashes",
    "load_pretrained",
    "lock_folder",
    "tracking_store",
    "unlock_folder",
]

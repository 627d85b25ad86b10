"""What surrounds every stage: files, folders, tracking, resuming, weights."""

from custom.runs.command_line import check_command_line
from custom.runs.files import file_hash, make_folder, remove_leftovers
from custom.runs.folders import RunFolder
from custom.runs.locks import TrainingPlace
from custom.runs.memory import keep_freed_memory
from custom.runs.options import check_options
from custom.runs.progress import SayProgress
from custom.runs.resuming import Resume, SeedEachEpoch
from custom.runs.tracking import LogToMLFlow, tracking_store
from custom.runs.weights import (
    ClipGradients,
    KeepBest,
    KeepLast,
    LoadWeights,
    RefuseDivergence,
    WeightAverage,
    existing_handler,
    load_pretrained,
)

__all__ = [
    "ClipGradients",
    "KeepBest",
    "KeepLast",
    "LoadWeights",
    "LogToMLFlow",
    "RefuseDivergence",
    "Resume",
    "RunFolder",
    "SayProgress",
    "SeedEachEpoch",
    "TrainingPlace",
    "WeightAverage",
    "check_command_line",
    "check_options",
    "existing_handler",
    "file_hash",
    "keep_freed_memory",
    "load_pretrained",
    "make_folder",
    "remove_leftovers",
    "tracking_store",
]

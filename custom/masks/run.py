"""A run of the mask generation module: references prepared, masks made, and what was made summed up."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from custom.masks.summary import summarise_masks
from custom.runs.folders import RunFolder
from tqdm import tqdm


def generate_masks(
    folder: RunFolder, *, prepare: Iterable, generate: Iterable, vessel_labels: Sequence[int], tracking_uri: str
) -> dict[str, float]:
    """Go through the loaders, whose transforms write what they make, under one claim of the folder.

    Args:
        folder: of the run.
        prepare: loader of the references that are not yet prepared.
        generate: loader of the masks that are not yet made.
        vessel_labels, tracking_uri: of :func:`custom.masks.summary.summarise_masks`.

    Returns:
        as :func:`custom.masks.summary.summarise_masks`.

    Raises:
        RuntimeError: when masks were not accepted; the others are complete.
    """
    with folder as provenance:  # before the loaders are asked how much there is to do, which `tqdm` does at once
        for loader, what in ((prepare, "references prepared"), (generate, "masks generated")):
            for _ in tqdm(loader, desc=what):
                pass
        return summarise_masks(
            output_dir=folder.output_dir, provenance=provenance, vessel_labels=vessel_labels, tracking_uri=tracking_uri
        )

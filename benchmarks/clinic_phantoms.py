"""Picture of phantoms of the clinic style: axial slices and a coronal one, each with the outlines of its labels beside.

    python benchmarks/clinic_phantoms.py

Makes subjects of one seed on a grid of 210 x 210 x 180 mm and writes docs/pictures/clinic_phantoms.png. Printed are
what was drawn of each, and seconds of processor time.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

import fire
import matplotlib.pyplot as plt
import numpy as np
from common import PICTURES
from custom.phantom.cohort import make_subject
from custom.phantom.labels import LABELS

logger = logging.getLogger(__name__)

WINDOW_HU = (-350.0, 650.0)


def _views(label: np.ndarray) -> list[tuple[int, int]]:
    """Axis and index of the slices: through left ventricle, pulmonary artery, and left ventricle from the front."""
    middle = {name: np.argwhere(label == LABELS[name]).mean(axis=0) for name in ("left_ventricle", "pulmonary_artery")}
    ventricle, artery = middle["left_ventricle"], middle["pulmonary_artery"]
    return [(2, int(ventricle[2])), (2, int(artery[2])), (1, int(ventricle[1]))]


def main(seed: int = 21, indices: Sequence[int] = (2, 4, 7, 9), spacing_mm: float = 1.5) -> None:
    """Draws the picture.

    Args:
        seed: of the cohort.
        indices: subjects, a row each.
        spacing_mm: voxel size.
    """
    shape = (int(210 / spacing_mm), int(210 / spacing_mm), int(180 / spacing_mm))
    figure, axes = plt.subplots(len(indices), 6, figsize=(12, 2.05 * len(indices)), squeeze=False)
    for row, index in zip(axes, indices, strict=True):
        start = time.process_time()
        subject = make_subject(seed, index, shape=shape, spacing_mm=spacing_mm, style="clinic")
        drawn, look = subject.parameters["anatomy"], subject.parameters["appearance"]
        logger.info(
            "subject %d: %s, heart %s, field %s, phase %s, kernel %s, noise %.0f HU, %.0f s",
            *(index, subject.label.shape, drawn["heart_kind"], drawn["field"], look["phase"], look["kernel"]),
            *(look["noise_hu"], time.process_time() - start),
        )
        for n, (axis, at) in enumerate(_views(subject.label)):
            image, label = (np.take(a, at, axis)[::-1].T for a in (subject.image, subject.label))
            for place in row[2 * n : 2 * n + 2]:
                place.imshow(image, cmap="gray", vmin=WINDOW_HU[0], vmax=WINDOW_HU[1], origin="lower")
                place.axis("off")
            for k in LABELS.values():
                if (label == k).any():
                    row[2 * n + 1].contour(label == k, [0.5], colors=[plt.get_cmap("tab10")(k - 1)], linewidths=0.7)
    figure.subplots_adjust(0, 0, 1, 1, 0.02, 0.02)
    figure.savefig(PICTURES / "clinic_phantoms.png", dpi=80, pil_kwargs={"optimize": True})


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    fire.Fire(main)

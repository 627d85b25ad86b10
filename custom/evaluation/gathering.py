"""What is gathered of the cases of a set, and how two cases are compared: what is large stays in files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from custom.evaluation.distances import local_correlation, ms_ssim
from custom.evaluation.realism import draw_patches, edge_speckle, interior_spectrum
from custom.volumes.grids import spacing_of
from custom.volumes.numbering import mapped_key
from numpy.typing import NDArray
from torch.nn import functional as F
from tqdm import tqdm

Case = Mapping[str, Any]
Features = Callable[[NDArray, NDArray], NDArray]
Traits = Callable[[NDArray, NDArray, Sequence[float]], dict[str, Any]]
_THUMBNAIL = 16  # voxels a side, ours: shows pose and habitus, which is enough to choose whom to compare
_PATCHES = 24  # of a case, ours: some two for each label


@dataclass(frozen=True)
class Labels:
    """What realism needs to know of the label map."""

    number: int
    homogeneous: Sequence[int]


@dataclass
class Volumes:
    """A set of cases: what is small in memory, what is large in files."""

    images: list[str]
    features: NDArray[np.float64]
    thumbnails: NDArray[np.float64]
    speckle: NDArray[np.float64]
    spectra: NDArray[np.float64]
    patches: list[torch.Tensor]
    traits: list[dict[str, Any]]
    folder: Path

    def __len__(self) -> int:
        return len(self.images)

    def view(self, index: int) -> tuple[NDArray, NDArray]:
        """Image in [0, 1] and heart of a case on the common grid."""
        content = np.load(self.folder / f"{index}.npz")
        return content["view"].astype(np.float32), content["heart"]

    def nearest(self, thumbnail: NDArray, count: int) -> list[int]:
        """Cases that look most like a thumbnail, best first."""
        return np.argsort(-self.thumbnails @ thumbnail, kind="stable")[:count].tolist()


def gather(
    cases: Sequence[Case],
    read: Callable[[Case], Case],
    features: Features,
    traits: Traits,
    labels: Labels,
    seed: int,
    folder: Path,
) -> Volumes:
    """Measure cases one by one; what is large goes to `folder`, which is made.

    Raises:
        ValueError: naming the case whose features are not as many as those of the first.
    """
    folder.mkdir()
    vectors, thumbnails = [], []
    speckle, spectra, patches, measured = [], [], [], []
    for index, case in enumerate(tqdm(cases, desc=f"{folder.name} cases read", leave=False)):
        item = read({key: case[key] for key in ("image", "label", mapped_key("label")) if key in case})
        image, label, view, inside = (np.asarray(item[k])[0] for k in ("image", "label", "view", "inside"))
        ids = label.round().astype(np.int64)
        vectors.append(np.asarray(features(image, ids), dtype=np.float64).ravel())
        measured.append(traits(image, ids, spacing_of(item["image"])))
        speckle.append(edge_speckle(image, ids))
        spectra.append(interior_spectrum(image, ids, labels.homogeneous))
        patches.append(draw_patches(image, ids, count=_PATCHES, num_labels=labels.number, seed=seed + index))
        if len(vectors[-1]) != len(vectors[0]):
            raise ValueError(
                f"features: all cases must give equally many, got {len(vectors[0])}, and {len(vectors[-1])} of "
                f"{case['image']}"
            )
        small = F.adaptive_avg_pool3d(torch.as_tensor(view)[None], _THUMBNAIL).numpy().ravel().astype(np.float64)
        thumbnails.append((small - small.mean()) / max(np.linalg.norm(small - small.mean()), 1e-9))
        np.savez(folder / str(index), view=view.astype(np.float16), heart=inside > 0)
    images = [str(case["image"]) for case in cases]
    tables = [np.array(values) for values in (vectors, thumbnails, speckle, spectra)]
    return Volumes(images, tables[0], tables[1], tables[2], tables[3], patches, measured, folder)


def with_templates(training: Sequence[Case], records: Sequence[Case]) -> list[Case]:
    """Training cases, and the templates of the records that are not among them."""
    known = {Path(case["image"]).resolve() for case in training}
    more = {record["template"]["image"]: record["template"] for record in records}
    return [*training, *(template for image, template in more.items() if Path(image).resolve() not in known)]


def diversity(volumes: Volumes, max_pairs: int, rng: np.random.Generator) -> dict[str, float]:
    """MS-SSIM of pairs of one set: of all, or of as many as allowed, drawn at random."""
    pairs = np.stack(np.triu_indices(len(volumes), 1), 1)
    chosen = np.sort(rng.permutation(len(pairs))[:max_pairs])
    values = [ms_ssim(volumes.view(i)[0], volumes.view(j)[0]) for i, j in tqdm(pairs[chosen], "pairs", leave=False)]
    return {
        "mean": float(np.mean(values)),
        "sd": float(np.std(values)),
        "highest": max(values),
        "pairs": len(values),
        "of": len(pairs),
    }


def closest(volumes: Volumes, index: int, others: Volumes, also: Sequence[int], count: int) -> tuple[int, float]:
    """Which of the others correlates most with a case window by window, and how much; the likeliest are compared."""
    image, heart = volumes.view(index)
    candidates = dict.fromkeys([*also, *others.nearest(volumes.thumbnails[index], count)])
    values = {k: local_correlation(image, others.view(k)[0], heart) for k in candidates}
    best = max(values, key=lambda k: values[k])
    return best, values[best]

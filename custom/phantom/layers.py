"""Tissues of a clinic phantom one over another, each kept where it is: a whole chest has more of them than memory."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from custom.geometry.topology import bounding_box, grown_box
from custom.phantom.geometry import Array, coverage
from numpy.typing import NDArray
from scipy import ndimage

__all__ = ["Box", "Layers", "Part", "box_of", "smooth_field"]

Box = tuple[slice, ...]


def box_of(mask: NDArray[np.bool_], margin: int = 0) -> Box | None:
    """Smallest box around True voxels (H, W, D), grown by a margin within the grid; None where there are none."""
    return grown_box(bounding_box(mask), [margin] * 3) if mask.any() else None


def smooth_field(shape: tuple[int, ...], sigma_voxels: float | tuple[float, ...], rng: np.random.Generator) -> Array:
    """Smooth Gaussian random field of mean 0 and SD 1."""
    f = ndimage.gaussian_filter(rng.standard_normal(shape, dtype=np.float32), sigma_voxels, mode="wrap", truncate=3.0)
    return (f - f.mean()) / f.std()


@dataclass(frozen=True)
class Part:
    """Share of each voxel that a tissue covers.

    Attributes:
        name: of the tissue.
        box: where it is.
        share: (h, w, d) float32 in [0, 1], within the box.
    """

    name: str
    box: Box
    share: Array


@dataclass
class Layers:
    """Layers from the back to the front; tissues of one layer exclude one another.

    Attributes:
        spacing_mm: isotropic voxel size.
        stack: a list of parts for every layer.
    """

    spacing_mm: float
    stack: list[list[Part]] = field(default_factory=list)

    def add(self, name: str, distance: Array, box: Box | None = None, *, weight: Array | float = 1.0) -> None:
        """A tissue in front of all so far.

        Args:
            name: of the tissue.
            distance: signed distance in mm, of the grid or of `box`.
            box: where `distance` lies; None: it is of the whole grid.
            weight: share of the tissue inside, a number or an array like `distance`.
        """
        part = self._part(name, coverage(distance, self.spacing_mm) * np.float32(weight), box)
        if part is not None:
            self.stack.append([part])

    def add_together(self, distances: dict[str, Array]) -> None:
        """Tissues that exclude one another, of the whole grid, in front of all so far."""
        parts = [self._part(n, coverage(d, self.spacing_mm), None) for n, d in distances.items()]
        self.stack.append([part for part in parts if part is not None])

    def _part(self, name: str, share: Array, box: Box | None) -> Part | None:
        inner = box_of(share > 0)
        if inner is None:
            return None
        start = (0, 0, 0) if box is None else tuple(s.start for s in box)
        place = tuple(slice(s.start + o, s.stop + o) for s, o in zip(inner, start, strict=True))
        return Part(name, place, np.ascontiguousarray(share[inner], np.float32))

    def share_of(self, name: str, shape: tuple[int, ...]) -> Array:
        """Coverage (H, W, D) of the last layer of that name; zero where there is none."""
        out = np.zeros(shape, np.float32)
        for part in (part for layer in self.stack for part in layer if part.name == name):
            out[part.box] = part.share
        return out

"""Volumes brought to the spacing of the model, with vessels in one piece."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from custom.geometry.centrelines import skeleton
from custom.geometry.topology import BoolArray
from custom.volumes.grids import resample_cubic
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import InvertibleTransform, MapTransform, Spacing, SpatialResample
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage

__all__ = ["ToSpacingd", "check_lengths", "resample_labels", "working_spacing"]

_BLUR_VOXELS = 0.5  # standard deviation, in the larger of the two voxels: the filter that goes before a coarser grid
_FINER = 0.999  # new edge over old edge; what is above is rounding
_REACH = 3.0  # standard deviations after which the filter is cut off
_NEIGHBOURS_26 = np.ones((3, 3, 3), dtype=bool)
_STEPS = np.argwhere(_NEIGHBOURS_26)[14:] - 1  # to 13 of the 26 neighbours: every pair of neighbours once
Box = tuple[slice, slice, slice]


def check_lengths(spacing_mm: Sequence[float]) -> None:
    """Refuse what is neither three lengths nor a finest and a coarsest one.

    Raises:
        ValueError: saying what to write.
    """
    lengths = np.asarray(spacing_mm)
    fits = lengths.shape in ((2,), (3,)) and lengths.dtype.kind in "iuf" and bool(np.isfinite(lengths).all())
    if not fits or lengths.min() <= 0 or (len(lengths) == 2 and lengths[0] > lengths[1]):
        raise ValueError(
            "spacing_mm must be three lengths in mm, one per axis, or the finest and the coarsest spacing, the finest "
            f"first, all above 0, got {spacing_mm}; write for example [1.5, 1.5, 1.5] or [0.7, 1.5]"
        )


def working_spacing(pixdim_mm: ArrayLike, spacing_mm: Sequence[float]) -> list[float]:
    """Spacing to which a volume is brought: as given, or as fine as the volume itself within limits.

    Args:
        pixdim_mm: voxel edges of the volume along the axes of RAS.
        spacing_mm: three lengths along the axes of RAS, or two, the finest and the coarsest spacing.

    Returns:
        three lengths along the axes of RAS; of limits, three times the largest voxel edge of the volume within them.

    Raises:
        ValueError: on another form of `spacing_mm`.
    """
    check_lengths(spacing_mm)
    if len(spacing_mm) == 3:
        return [float(s) for s in spacing_mm]
    finest, coarsest = spacing_mm
    return [float(np.clip(np.max(np.asarray(pixdim_mm, dtype=float)), finest, coarsest))] * 3


def _share(labels: NDArray, k: int, box: Box, to_source: NDArray, shape: Sequence[int]) -> tuple[NDArray, Box]:
    """How much of each new voxel a label fills, in a box of the new grid that holds all of it, and that box.

    Occupancy blurred by a Gaussian and read linearly at the centres of the new voxels, edge values outside.
    """
    sigma = _BLUR_VOXELS * np.maximum(np.linalg.norm(to_source[:3, :3], axis=1), 1.0)
    margin = np.ceil(_REACH * sigma).astype(int) + 1
    spans = zip(box, margin, labels.shape, strict=True)
    wide = [slice(max(s.start - m, 0), min(s.stop + m, n)) for s, m, n in spans]
    filled = (labels[tuple(wide)] == k).astype(np.float32)
    ndimage.gaussian_filter(filled, sigma, output=filled, mode="nearest", truncate=_REACH)
    first = np.array([s.start for s in wide])
    corners = np.stack(np.meshgrid(*((s.start, s.stop - 1) for s in wide)), -1).reshape(-1, 3)
    corners = (corners - to_source[:3, 3]) @ np.linalg.inv(to_source[:3, :3]).T
    low = np.clip(np.floor(corners.min(0)).astype(int) - 1, 0, np.array(shape) - 1)
    high = np.clip(np.ceil(corners.max(0)).astype(int) + 2, low + 1, shape)
    share = ndimage.affine_transform(
        filled,
        to_source[:3, :3],
        to_source[:3, :3] @ low + to_source[:3, 3] - first,
        output_shape=tuple(high - low),
        output=np.float32,
        order=1,
        mode="nearest",
    )
    h, w, d = (slice(int(a), int(b)) for a, b in zip(low, high, strict=True))
    return share, (h, w, d)


def _lines(mask: BoolArray, first: NDArray, to_source: NDArray, where: Box) -> tuple[NDArray[np.int32], int]:
    """Centre line of a mask drawn into a box of another grid, and the number of pieces of the mask.

    Neighbours on the line are linked by points no more than one new voxel apart along each axis, so what hangs together
    in the mask does so in the drawing, and still does when that is thinned.

    Args:
        mask: (h, w, d) a box of the old grid.
        first: its first voxel.
        to_source: voxels of the new grid to those of the old.
        where: the box of the new grid.

    Returns:
        (H, W, D) 0 off the line, else the number of the piece; and how many there are.
    """
    pieces, count = ndimage.label(mask, _NEIGHBOURS_26)
    line = np.pad(skeleton(mask), 1)
    voxels = np.argwhere(line)
    start, inverse = np.array([s.start for s in where]), np.linalg.inv(to_source[:3, :3])
    drawn = np.zeros([s.stop - s.start for s in where], dtype=np.int32)
    for step in np.vstack([[0, 0, 0], _STEPS]):
        linked = voxels[line[tuple((voxels + step).T)]]
        ids = pieces[tuple((linked - 1).T)]
        points = max(int(np.ceil(np.abs(inverse @ step).max())), 1)
        for part in range(points):
            old = linked - 1 + first + step * part / points
            new = np.rint((old - to_source[:3, 3]) @ inverse.T).astype(int) - start
            drawn[tuple(np.clip(new, 0, np.array(drawn.shape) - 1).T)] = ids
    return drawn * skeleton(drawn), count


def _fullest(share: NDArray, line: BoolArray, wanted: float) -> BoolArray:
    """The line and the fullest voxels beside it, as near to a number of voxels as equal shares allow."""
    missing, rest = round(wanted) - int(line.sum()), share[~line & (share > 0)]
    if missing <= 0 or len(rest) == 0:
        return line.copy()
    missing = min(missing, len(rest))
    least = np.partition(rest, len(rest) - missing)[len(rest) - missing]
    above, with_equals = int((rest > least).sum()), int((rest >= least).sum())
    fuller: BoolArray = share > least if missing - above < with_equals - missing else share >= least
    return fuller | line


def _with_line(mask: BoolArray, line: BoolArray) -> tuple[BoolArray, int]:
    """The components of a mask that hold some of a line within it, and their number."""
    components, _ = ndimage.label(mask, _NEIGHBOURS_26)
    held = np.unique(components[line])
    return np.isin(components, held), len(held)


def _thin_mask(share: NDArray, drawn: NDArray[np.int32], pieces: int, wanted: float) -> BoolArray:
    """A thin label on its new grid: of its old volume, with its pieces whole, and apart where their lines are apart."""
    line = drawn > 0
    mask, found = _with_line(_fullest(share, line, wanted), line)
    if found < pieces:
        nearest = ndimage.distance_transform_edt(~line, return_distances=False, return_indices=True)
        ids = drawn[tuple(nearest)] * mask
        lowest = ndimage.minimum_filter(np.where(mask, ids, pieces + 1), 3)
        between = mask & ~line & (ndimage.maximum_filter(ids, 3) != lowest)
        mask, _ = _with_line(mask & ~between, line)
    return mask


def resample_labels(
    label_map: NDArray[np.integer], to_source: ArrayLike, shape: Sequence[int], thin_labels: Collection[int] = ()
) -> NDArray[np.integer]:
    """A label map on another grid, without the staircases and broken vessels of nearest-neighbour reading. Ours.

    A voxel goes to the label that fills most of it after an anti-aliasing filter, or to the background. Thin labels are
    drawn over the others: their centre line, which leaves a connected tree connected, and the voxels they fill most,
    up to their old volume. Where the centre lines alone are larger than that, the volume grows.

    Args:
        label_map: (h, w, d) whole numbers of at least 0; 0 is background.
        to_source: 4 x 4, voxels of the new grid to voxels of `label_map`; no axes swapped.
        shape: (H, W, D) of the new grid.
        thin_labels: ids of vessels, 26-connected.

    Returns:
        (H, W, D) of the dtype of `label_map`. An empty map stays empty.
    """
    matrix, size = np.asarray(to_source, dtype=float), tuple(int(n) for n in shape)
    winner, best, total = np.zeros(size, label_map.dtype), np.zeros(size, np.float32), np.zeros(size, np.float32)
    drawings: list[tuple[int, Box, BoolArray, BoolArray]] = []
    for k, box in enumerate(ndimage.find_objects(label_map), start=1):
        if box is None:
            continue
        share, where = _share(label_map, k, box, matrix, size)
        total[where] += share
        if k not in thin_labels:
            better = share > best[where]
            winner[where][better], best[where][better] = k, share[better]
            continue
        mask = label_map[box] == k
        drawn, pieces = _lines(mask, np.array([s.start for s in box]), matrix, where)
        wanted = float(mask.sum() / abs(np.linalg.det(matrix[:3, :3])))
        drawings.append((k, where, _thin_mask(share, drawn, pieces, wanted), drawn > 0))
    np.subtract(1, total, out=total)
    winner[best <= total] = 0
    for part in (2, 3):  # lines last, so that one vessel does not cut another
        for drawing in drawings:
            winner[drawing[1]][drawing[part]] = drawing[0]
    return winner


class ToSpacingd(MapTransform, InvertibleTransform):
    """Bring volumes (1, H, W, D) in RAS to the working spacing of one of them, on the grids of `Spacingd`.

    Label maps are read by :func:`resample_labels`, images linearly where the new voxels are as large as the old or
    larger, and by cubic splines where an edge is smaller, as linear reading there costs thin vessels a fifth of their
    contrast. A volume that has the spacing already comes back as it is.

    Args:
        keys: volumes to bring there.
        label_keys: those that are label maps.
        spacing_mm: see :func:`working_spacing`.
        follow: key of the volume whose voxels decide; need not be one of `keys`.
        thin_labels: ids of vessels, which stay connected.
        linear_keys: those that are read linearly in any case.

    Raises:
        ValueError: on another form of `spacing_mm`.
    """

    def __init__(
        self,
        keys: KeysCollection,
        *,
        label_keys: Collection[str],
        spacing_mm: Sequence[float],
        follow: str,
        thin_labels: Collection[int] = (),
        linear_keys: Collection[str] = (),
    ) -> None:
        super().__init__(keys)
        check_lengths(spacing_mm)
        self.label_keys, self.spacing_mm, self.follow = set(label_keys), spacing_mm, follow
        self.thin_labels, self.linear_keys = set(thin_labels), set(linear_keys)
        self.resample = SpatialResample(padding_mode="border", dtype=np.float64)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Resample the volumes of one item."""
        item = dict(data)
        spacing = Spacing(working_spacing(item[self.follow].pixdim, self.spacing_mm))
        spacing.sp_resample = self.resample  # whose trace it is that `inverse` follows
        grids: list[tuple[MetaTensor, Sequence[int]]] = []
        for key in self.key_iterator(item):
            volume, mode = item[key], "nearest" if key in self.label_keys else "bilinear"
            same = [new for old, new in grids if _alike(old, volume)]
            moved = cast(MetaTensor, spacing(volume, mode=mode, output_spatial_shape=same[0] if same else None))
            grids.append((volume, moved.shape[1:]))
            if moved.shape != volume.shape or not torch.equal(moved.affine, volume.affine):
                self._improve(key, volume, moved)
            item[key] = moved
        return item

    def _improve(self, key: Hashable, volume: MetaTensor, moved: MetaTensor) -> None:
        """Puts better values in place of those that MONAI read."""
        to_source = np.linalg.solve(volume.affine.numpy(), moved.affine.numpy())
        values, new = volume.as_tensor()[0], moved.as_tensor()[0]
        if key in self.label_keys:
            label_map = values.cpu().numpy()
            label_map = label_map.astype(np.min_scalar_type(int(label_map.max())))
            new.copy_(torch.from_numpy(resample_labels(label_map, to_source, new.shape, self.thin_labels)))
        elif key not in self.linear_keys and np.linalg.norm(to_source[:3, :3], axis=0).min() < _FINER:
            new.copy_(resample_cubic(values, volume.affine, moved.affine, new.shape))

    def inverse(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Back along the traces, as `Spacingd`."""
        item = dict(data)
        for key in self.key_iterator(item):
            item[key] = self.resample.inverse(item[key])
        return item


def _alike(first: MetaTensor, second: MetaTensor) -> bool:
    """Whether two volumes are of one size and, but for rounding, one spacing: `Spacingd` gives such one new size."""
    return first.shape == second.shape and np.allclose(first.pixdim, second.pixdim, atol=1e-3)

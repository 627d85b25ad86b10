"""Domain randomisation of CT: what a painted volume looks like, drawn tissue by tissue, without a network.

After SynthSeg (Billot et al. 2023, Medical Image Analysis 86): a label map is painted with drawn intensities, and what
it leaves unlabelled is clustered into classes that are painted likewise. CT numbers mean something, so they are drawn
within what a tissue can have, and what was brighter stays brighter (ours).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from custom.geometry.deformation import random_velocity
from numpy.typing import NDArray
from scipy.cluster.vq import kmeans2
from scipy.optimize import isotonic_regression

__all__ = ["draw_label_means", "draw_tissues", "recoloured", "smooth_field", "tissue_classes", "tissue_range"]

Values = NDArray[np.float64]

_TISSUE_HU = (-1024, -950, -850, -600, -250, -100, 40, 150, 400, 800, 3071)
_RANGE_HU = (8, 15, 50, 90, 60, 20, 25, 50, 100, 170, 200)
"""How far a tissue of so many HU may be from itself in another patient or at another tube voltage: air next to nothing,
aerated lung -900 to -800, fat -120 to -80, muscle and parenchyma 15 to 65, bone by hundreds. Ours, after the ranges of
radiology texts."""
_BIN = 0.05  # of a range: so finely intensities are counted
_ITERATIONS = 30  # of k-means, ours; in one dimension it has settled by then
_IN_POOL_HU = 15.0  # ours: SD of a chamber about the blood that it shares; phantoms are drawn up to 35 HU apart
_ENHANCED_HU = 200.0  # above it blood has contrast agent and no other soft tissue has as much
_FOLLOWS = 2.0  # ranges, ours: bone as bright as unlabelled blood changes with it, and must stay bone
_ANCHOR = 100.0  # weight of such a class among those that are kept in order
_SMOOTH_MM = 15.0  # ours: correlation length of what varies within a tissue


def tissue_range(hu: NDArray | float) -> Values:
    """Half of the range in HU within which a tissue of so many HU is drawn."""
    return np.asarray(np.interp(hu, _TISSUE_HU, _RANGE_HU))


def tissue_classes(background_hu: NDArray, count: int) -> Values:
    """Cluster intensities into classes of tissue by k-means.

    HU are counted in `tissue_range`, or most classes would be shades of lung; and by the square root of how many voxels
    have them, or a trachea, which is few, would go with the lung.

    Args:
        background_hu: of unlabelled tissue, any shape; without grain.
        count: of classes.

    Returns:
        mean HU of each class, ascending; fewer where there are not so many intensities, none of no voxel.
    """
    grid = np.arange(_TISSUE_HU[0], _TISSUE_HU[-1] + 1.0)
    scale = np.concatenate([[0.0], np.cumsum(1 / tissue_range((grid[1:] + grid[:-1]) / 2))])  # HU -> ranges above air
    bins = np.rint(np.interp(background_hu.ravel(), grid, scale) / _BIN).astype(np.int64)
    counts = np.bincount(bins)
    found = counts.nonzero()[0]
    if len(found) == 0:
        return np.zeros(0)
    points = np.repeat(found, np.ceil(np.sqrt(counts[found])).astype(int)).astype(float)
    evenly = np.linspace(found[0], found[-1], count)
    start = np.unique(found[np.abs(found[:, None] - evenly).argmin(0)]).astype(float)
    _, assigned = kmeans2(points, start, iter=_ITERATIONS, minit="matrix")
    means = [points[assigned == k].mean() for k in np.unique(assigned)]
    return np.sort(np.interp(np.array(means) * _BIN, scale, grid))


def draw_tissues(classes: Values, blood_hu: Sequence[tuple[float, float]], rng: np.random.Generator) -> Values:
    """Draw the HU of each class within the range of its tissue, in their order: what was brighter is not made darker.

    Rims of partial volume would else get a colour of their own. Vessels of the background hang together with labelled
    blood: the class of its HU changes as it does.

    Args:
        classes: mean HU of each, ascending.
        blood_hu: mean HU that each labelled pool of blood has in the template, and the one that was drawn for it.
        rng: source of randomness.

    Returns:
        HU of each, not descending.
    """
    reach = tissue_range(classes)
    drawn, weights = rng.uniform(classes - reach, classes + reach), np.ones_like(classes)
    for own, new in blood_hu:
        if len(classes) == 0 or not own > _ENHANCED_HU:
            continue
        k = int(np.abs(classes - own).argmin())
        if abs(classes[k] - own) <= reach[k]:
            drawn[k] = classes[k] + np.clip(new - own, -_FOLLOWS * reach[k], _FOLLOWS * reach[k])
            weights[k] = _ANCHOR
    return isotonic_regression(drawn, weights=weights).x if len(classes) else drawn


def recoloured(background_hu: NDArray[np.float32], classes: Values, drawn_hu: Values) -> NDArray[np.float32]:
    """Give every class its drawn HU; a voxel between two classes, partial volume of both, lies as far between these."""
    if len(classes) == 0:
        return background_hu
    ends = [-1e4, *classes, 1e4]  # beyond the outermost classes HU are shifted
    new = [drawn_hu[0] - classes[0] - 1e4, *drawn_hu, drawn_hu[-1] - classes[-1] + 1e4]
    return np.interp(background_hu, ends, new).astype(np.float32)


def draw_label_means(
    nominal_hu: Sequence[float],
    plausible_hu: Mapping[int, Sequence[float]],
    pools: Sequence[str | None],
    rng: np.random.Generator,
) -> Values:
    """Draw the mean HU of every label: most often near its nominal one, as far off as is plausible.

    Labels of one pool, chambers and vessels that the same blood fills, are shifted together from their nominal HU and
    differ by 15 HU beyond; the shift is triangular, its limits those that no label of the pool can go beyond.

    Args:
        nominal_hu: of every label, background first.
        plausible_hu: label id -> lowest and highest mean; a label without has the range of its tissue.
        pools: name of the pool of every label, None where it has none.
        rng: source of randomness.

    Returns:
        (num_labels,) HU; the background keeps its nominal one.

    Raises:
        ValueError: naming a pool whose labels have no shift in common.
    """
    nominal = np.array(nominal_hu, dtype=float)
    reach = tissue_range(nominal)
    limits = np.stack([nominal - reach, nominal + reach], 1)
    for k, (low, high) in plausible_hu.items():
        limits[int(k)] = low, high
    drawn = nominal.copy()
    groups: dict[str | int, list[int]] = {}
    for k in range(1, len(nominal)):
        name = pools[k]
        groups.setdefault(k if name is None else name, []).append(k)
    for group, members in groups.items():
        low, high = (limits[members, 0] - nominal[members]).max(), (limits[members, 1] - nominal[members]).min()
        if not low < high:
            raise ValueError(
                f"anatomy: labels {members} of pool {group} have no change of contrast in common that keeps all within "
                "plausible_hu; widen these, or correct nominal_hu"
            )
        own = rng.normal(0, _IN_POOL_HU, len(members)) * (len(members) > 1)
        drawn[members] += rng.triangular(low, float(np.clip(0.0, low, high)), high) + own
        drawn[members] = drawn[members].clip(limits[members, 0], limits[members, 1])
    return drawn


def smooth_field(shape: Sequence[int], spacing_mm: Sequence[float], rng: np.random.Generator) -> NDArray[np.float32]:
    """A smooth Gaussian random field (H, W, D) of unit SD, correlated over 15 mm."""
    generator = torch.Generator().manual_seed(int(rng.integers(1 << 31)))
    sigma = max(_SMOOTH_MM, *spacing_mm)
    drawn = random_velocity(shape, spacing_mm=spacing_mm, sigma_mm=sigma, amplitude_mm=1.0, generator=generator)
    field: NDArray[np.float32] = drawn[0, 0].numpy()
    return field / max(float(field.std()), 1e-6)

"""Volumes painted without a network, as a dictionary transform, and what stands in place of the network's inferer."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from custom.diffusion.context import Context
from custom.diffusion.noise import HU_RANGE
from custom.diffusion.painting import draw_label_means, draw_tissues, recoloured, smooth_field, tissue_classes
from custom.diffusion.prior import bed_vessels, join_vessels, paint_prior, template_background
from custom.runs.files import content_hash
from custom.volumes.artefacts import (
    PLAQUE_HU,
    PLAQUE_RADIUS_MM,
    SPOKES,
    STREAK_HU,
    add_plaque,
    add_streaks,
    blur_by_motion,
)
from custom.volumes.grids import as_batch, on_grid_of, spacing_of
from monai.inferers import Inferer
from monai.transforms import Transform
from numpy.typing import NDArray
from scipy import ndimage

_SMOOTH_HU = (2.0, 8.0)  # ours: SD of the slow variation within a tissue
_OWN_VOXEL = 1 / 12  # variance of a box of one voxel: a scan averages over each, where a painted label has stairs
_PLAQUES = (1, 7)  # as of phantoms: 1 to 6
_MOTION_MM = (1.0, 4.0)  # as of phantoms

Volume = NDArray[np.float32]


def _random(what: str, seed: int, case: str) -> np.random.Generator:
    return np.random.default_rng(int(content_hash(f"{what} {seed}:{case}".encode()), 16))


def _place_mm(voxel: NDArray[np.int64], shape: Sequence[int], spacing_mm: Sequence[float]) -> list[float]:
    """Of a voxel, from the middle of the grid."""
    return [(float(v) - (n - 1) / 2) * s for v, n, s in zip(voxel, shape, spacing_mm, strict=True)]


class PaintTissuesd(Transform):
    """Paint a mask, and what the template shows around it, in drawn HU: domain randomisation in place of a network.

    Reads `case`, `label`, and of the template, aligned to it, `template_image` (structure), `template_label`,
    `statistics`, and what :class:`custom.diffusion.grain.MeasureGraind` adds. Adds `prior` (1, H, W, D) HU, the painted
    structure; `context`, which holds it for :class:`PaintedInferer`; `drawn_hu` (num_labels,), the means that were
    drawn; and `mean_change_hu`, what they are above the template's. Changes the strength of the grain, and `statistics`
    to NaN: a template's say nothing of other colours, and are not to be judged by.

    Args:
        nominal_hu: of every label, background first.
        plausible_hu: label id -> lowest and highest mean.
        pools: name of the pool of every label, see :func:`custom.diffusion.painting.draw_label_means`.
        thin_labels: ids of vessels, which lie in soft tissue, and have the plaques and the motion.
        classes: of unlabelled tissue.
        blur_mm: smallest and largest SD of the point spread, a Gaussian.
        grain: smallest and largest factor of the template's noise.
        artefacts: some of "plaques", "streaks" and "motion"; those that need a vessel leave a mask without one alone.
        seed: of all draws, which depend on it and the name of the case alone.
    """

    def __init__(
        self,
        *,
        nominal_hu: Sequence[float],
        plausible_hu: Mapping[int, Sequence[float]],
        pools: Sequence[str | None],
        thin_labels: Sequence[int] = (),
        classes: int = 12,
        blur_mm: Sequence[float] = (0.3, 0.7),
        grain: Sequence[float] = (0.5, 1.5),
        artefacts: Sequence[str] = (),
        seed: int = 0,
    ) -> None:
        self.nominal_hu, self.plausible_hu, self.pools = list(nominal_hu), dict(plausible_hu), list(pools)
        self.thin_labels, self.classes, self.artefacts, self.seed = list(thin_labels), classes, list(artefacts), seed
        self.blur_mm, self.grain = (float(blur_mm[0]), float(blur_mm[1])), (float(grain[0]), float(grain[1]))

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Paint one item."""
        rng = _random("painted", self.seed, data["case"])
        label, spacing = as_batch(data["label"]), spacing_of(data["label"])
        means = draw_label_means(self.nominal_hu, self.plausible_hu, self.pools, rng)
        before = torch.as_tensor(data["statistics"])[:, 0].numpy()
        background = self._background(data, label, spacing, self._blood(before, means), rng)
        painted = paint_prior(label, torch.from_numpy(means).float(), background)
        image: Volume = painted[0, 0].numpy()
        image += np.float32(rng.uniform(*_SMOOTH_HU)) * smooth_field(image.shape, spacing, rng)
        self._add_artefacts(image, label[0, 0].numpy(), means, spacing, data["case"])
        sigma = np.sqrt(rng.uniform(*self.blur_mm) ** 2 / np.square(spacing) + _OWN_VOXEL)
        image = ndimage.gaussian_filter(image, sigma, mode="nearest")
        factor = rng.uniform(*self.grain)
        structure, none = torch.from_numpy(image)[None, None], torch.full_like(label, -1)
        context = Context(label, torch.zeros_like(label), none, structure).stacked()
        drawn, own = torch.from_numpy(means).float(), torch.as_tensor(data["statistics"])
        return {
            **data,
            "prior": on_grid_of(structure, data["label"]),
            "context": on_grid_of(context, data["label"]),
            "statistics": torch.full_like(own, torch.nan),
            "drawn_hu": drawn,
            "mean_change_hu": drawn - own[:, 0],
            "grain_spectrum": data["grain_spectrum"] * factor**2,
            "noise_sd": float(data["noise_sd"]) * factor,
        }

    def _blood(self, before: NDArray, means: NDArray) -> list[tuple[float, float]]:
        """Mean HU of each pool in the template, and as it was drawn, over the labels that the template shows."""
        pairs = []
        for pool in sorted({name for name in self.pools if name is not None}):
            members = [k for k, name in enumerate(self.pools) if name == pool and np.isfinite(before[k])]
            if members:
                pairs.append((float(before[members].mean()), float(means[members].mean())))
        return pairs

    def _background(
        self,
        data: Mapping[Hashable, Any],
        label: torch.Tensor,
        spacing: Sequence[float],
        blood_hu: Sequence[tuple[float, float]],
        rng: np.random.Generator,
    ) -> torch.Tensor:
        """What surrounds the template's heart, warped and filled as in the prior, in drawn HU."""
        template, template_label = as_batch(data["template_image"]), as_batch(data["template_label"])
        bedded = bed_vessels(template, template_label, label, self.thin_labels, spacing)
        surroundings = template_background(bedded, template_label)
        surroundings = join_vessels(surroundings, template, template_label, label, spacing)
        classes = tissue_classes(surroundings[label <= 0].numpy(), self.classes)
        drawn = draw_tissues(classes, blood_hu, rng)
        return torch.from_numpy(recoloured(surroundings[0, 0].numpy(), classes, drawn))[None, None]

    def _add_artefacts(self, image: Volume, label: Volume, means: NDArray, spacing: Sequence[float], case: str) -> None:
        """Each from a draw of its own, so that one more changes nothing of the others."""
        vessels = np.isin(label, self.thin_labels)
        for name in self.artefacts:
            rng = _random(name, self.seed, case)
            if name == "streaks":
                _streak(image, label, means, spacing, rng)
            elif vessels.any():
                {"plaques": _calcify, "motion": _move}[name](image, vessels, spacing, rng)


def _calcify(image: Volume, vessels: NDArray[np.bool_], spacing: Sequence[float], rng: np.random.Generator) -> None:
    """Calcified plaques in vessels."""
    voxels = np.argwhere(vessels)
    for voxel in voxels[rng.integers(0, len(voxels), rng.integers(*_PLAQUES))]:
        options = {"radius_mm": rng.uniform(*PLAQUE_RADIUS_MM), "plaque_hu": rng.uniform(*PLAQUE_HU)}
        add_plaque(image, _place_mm(voxel, image.shape, spacing), **options, spacing_mm=spacing)


def _move(image: Volume, vessels: NDArray[np.bool_], spacing: Sequence[float], rng: np.random.Generator) -> None:
    """Motion of one of the vessels' pieces."""
    pieces, count = ndimage.label(vessels, np.ones((3, 3, 3)))
    moving = (pieces == rng.integers(1, count + 1)).astype(np.float32)
    options = {"motion_mm": rng.uniform(*_MOTION_MM), "heading": rng.uniform(0, 2 * np.pi)}
    blur_by_motion(image, moving, **options, spacing_mm=spacing)


def _streak(image: Volume, label: Volume, means: NDArray, spacing: Sequence[float], rng: np.random.Generator) -> None:
    """Streaks from a voxel of the brightest label."""
    present = [int(k) for k in np.unique(label) if k > 0]
    if not present:
        return
    voxels = np.argwhere(label == max(present, key=lambda k: means[k]))
    source = _place_mm(voxels[rng.integers(len(voxels))], image.shape, spacing)
    phases = rng.uniform(0, 2 * np.pi, len(SPOKES)).tolist()
    add_streaks(image, source, phases=phases, strength_hu=rng.uniform(*STREAK_HU), spacing_mm=spacing)


class PaintedInferer(Inferer):
    """Give back the painted structure that a context holds: nothing is inferred, no network is called."""

    def __call__(  # type: ignore[override]
        self, inputs: torch.Tensor, network: torch.nn.Module, cases: Sequence[str] = ()
    ) -> torch.Tensor:
        """Context (B, 4, H, W, D) -> structure (B, 1, H, W, D) in HU, within the limits of images."""
        context = torch.as_tensor(inputs).as_subclass(torch.Tensor)
        return Context.of(context).prior_hu.clamp(*HU_RANGE)

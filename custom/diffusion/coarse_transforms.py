"""Dictionary transforms of the coarse stage: training pairs at 6 mm, and the coarse image of a case to be rendered."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from custom.diffusion.coarse import (
    CELL_MM,
    CoarseUNet,
    cells_over,
    cells_within,
    coarse_context,
    coarsened,
    low_pass,
    refined,
    standardised,
)
from custom.diffusion.noise import case_noise
from custom.diffusion.prior import complete_statistics, paint_prior
from custom.diffusion.schedule import spaced_timesteps
from custom.geometry.deformation import identity_coordinates, random_velocity
from custom.volumes.grids import as_batch, on_grid_of, sample_cubic, spacing_of
from custom.volumes.reading import file_of
from monai.data import MetaTensor
from monai.transforms import Randomizable, Transform


class Coarsend(Transform):
    """Reduce an item to what the coarse stage learns from: whole volumes at 6 mm.

    Reads `image` (structure, HU), `label` and `statistics`; keeps `statistics`, and `image` (1, h, w, d) and
    `fractions` (num_labels, h, w, d), the share of each label, in their place.

    Args:
        num_labels: label ids 0 to num_labels - 1.
    """

    def __init__(self, *, num_labels: int) -> None:
        self.num_labels = num_labels

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Reduce one item."""
        image, label, spacing = as_batch(data["image"]), as_batch(data["label"]), spacing_of(data["label"])
        cells = cells_within(image.shape[2:], spacing)
        fractions = [coarsened((label == k).float(), spacing, cells)[0] for k in range(self.num_labels)]
        kept = {key: value for key, value in data.items() if key not in ("label", "grain")}
        return {
            **kept,
            "image": MetaTensor(coarsened(image, spacing, cells)[0], meta={"filename_or_obj": file_of(data["image"])}),
            "fractions": torch.cat(fractions),
        }


class RandCoarsePaird(Randomizable, Transform):
    """Make a training pair of the coarse stage (`image`, `context`) from what :class:`Coarsend` kept.

    Contrast, size, place and shape vary as in the fine stage. Everything is linear in the shares of the labels, so it
    can be done at 6 mm.

    Args:
        nominal_hu: mean of every label, background first; paints labels that the scan does not show.
        roi_size: voxels of the pair.
        unconditional_prob: probability of telling nothing.
        contrast_shift_hu: SD of a shift common to contrast-filled labels (those above `contrast_above_hu`).
        label_shift_hu: SD of a further shift of every label.
        contrast_above_hu: see there.
        scale: largest change of size, as a share.
        amplitude_mm, sigma_mm: RMS displacement and correlation length of a smooth deformation.

    Raises:
        ValueError: naming the file, when a field of view is smaller than the ROI.
    """

    def __init__(
        self,
        *,
        nominal_hu: Sequence[float],
        roi_size: Sequence[int],
        unconditional_prob: float = 0.3,
        contrast_shift_hu: float = 70.0,
        label_shift_hu: float = 30.0,
        contrast_above_hu: float = 200.0,
        scale: float = 0.12,
        amplitude_mm: float = 6.0,
        sigma_mm: float = 40.0,
    ) -> None:
        self.nominal_hu, self.roi_size = list(nominal_hu), list(roi_size)
        self.unconditional_prob, self.scale = unconditional_prob, scale
        self.contrast_shift_hu, self.label_shift_hu = contrast_shift_hu, label_shift_hu
        self.contrast_above_hu, self.amplitude_mm, self.sigma_mm = contrast_above_hu, amplitude_mm, sigma_mm

    def randomize(self, size: Sequence[int]) -> None:
        """Draw everything that is random about one pair."""
        num_labels = len(self.nominal_hu)
        self._told = bool(self.R.rand() >= self.unconditional_prob)
        self._contrast = float(self.R.normal(0, self.contrast_shift_hu))
        self._shift = torch.as_tensor(self.R.normal(0, self.label_shift_hu, num_labels), dtype=torch.float32)
        self._scale = torch.as_tensor(self.R.uniform(1 - self.scale, 1 + self.scale, 3), dtype=torch.float32)
        room = [(n - r) / 2 for n, r in zip(size, self.roi_size, strict=True)]
        self._place = torch.as_tensor([self.R.uniform(-m, m) for m in room], dtype=torch.float32)
        self._seed = int(self.R.randint(0, 1 << 31))

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Make one pair."""
        image, fractions = as_batch(data["image"]), as_batch(data["fractions"])
        size = image.shape[2:]
        if any(n < r for n, r in zip(size, self.roi_size, strict=True)):
            raise ValueError(
                f"{file_of(data['image'])}: a field of view of {[n * CELL_MM for n in size]} mm is smaller than the "
                f"ROI of {[n * CELL_MM for n in self.roi_size]} mm; lower `roi_size`, or use a larger field of view"
            )
        self.randomize(size)
        means = complete_statistics(data["statistics"], self.nominal_hu)[0][:, 0]
        means[0] = self.nominal_hu[0]
        shift = self._shift + self._contrast * (means > self.contrast_above_hu)
        shift[0] = 0
        changed = image + torch.einsum("k,bkhwd->bhwd", shift, fractions)[:, None]
        painted = torch.einsum("k,bkhwd->bhwd", means + shift, fractions)[:, None]
        where = self._coordinates(size)
        drawn, told, foreground = (sample_cubic(v, where) for v in (changed, painted, 1 - fractions[:, :1]))
        context = coarse_context(told if self._told else None, foreground)
        return {"image": standardised(drawn)[0], "context": context[0], "case": data["case"]}

    def _coordinates(self, size: Sequence[int]) -> torch.Tensor:
        centre = torch.tensor([(n - 1) / 2 for n in self.roi_size])[None, :, None, None, None]
        to = torch.tensor([(n - 1) / 2 for n in size])[None, :, None, None, None]
        here = (identity_coordinates(self.roi_size) - centre) * self._scale[None, :, None, None, None]
        bent = random_velocity(
            self.roi_size,
            spacing_mm=[CELL_MM] * 3,
            sigma_mm=self.sigma_mm,
            amplitude_mm=self.amplitude_mm,
            generator=torch.Generator().manual_seed(self._seed),
        )
        return here + to + self._place[None, :, None, None, None] + bent


def _painted(label: torch.Tensor, statistics: torch.Tensor, nominal_hu: Sequence[float]) -> torch.Tensor:
    """The mask on a flat background, (1, 1, H, W, D) HU."""
    means = complete_statistics(statistics, nominal_hu)[0][:, 0]
    return paint_prior(label, means, torch.full_like(label, nominal_hu[0]))


class Surroundingsd(Transform):
    """Add `surroundings` of a scan: the low-pass part of its structure less its painted mask, as if they were drawn.

    That difference does not change when labels change their contrast.

    Args:
        nominal_hu: of every label, background first.
    """

    def __init__(self, *, nominal_hu: Sequence[float]) -> None:
        self.nominal_hu = list(nominal_hu)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Measure one item, which holds `image` (structure), `label` and `statistics`."""
        image, label = as_batch(data["image"]), as_batch(data["label"])
        spacing, size = spacing_of(data["label"]), image.shape[2:]
        difference = image - _painted(label, data["statistics"], self.nominal_hu)
        drawn = refined(coarsened(difference, spacing, cells_over(size, spacing)), size, spacing)
        return {**data, "surroundings": on_grid_of(drawn, data["label"])}


class DrawCoarsed(Transform):
    """Draw what surrounds a mask without a template: `surroundings` (1, H, W, D) HU on the grid of its `label`.

    Needs `case`, `label` and `statistics`, by which the mask is painted.

    Args:
        network: whose weights are loaded by the time of the call.
        mode: "mask_only", or "unconditional", which does not look at the mask.
        nominal_hu: of every label, background first.
        timesteps: number of network calls.
        seed: of the noise, which depends on it and the case alone.
    """

    def __init__(
        self, network: CoarseUNet, *, mode: str, nominal_hu: Sequence[float], timesteps: int = 20, seed: int = 0
    ) -> None:
        self.network, self.mode, self.nominal_hu = network, mode, list(nominal_hu)
        self.times, self.seed = spaced_timesteps(timesteps), seed

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Draw for one item."""
        label, spacing = as_batch(data["label"]), spacing_of(data["label"])
        size, device = label.shape[2:], self.network.alphas_cumprod.device
        cells = cells_over(size, spacing)
        painted = _painted(label, data["statistics"], self.nominal_hu)
        told = coarsened(painted, spacing, cells)
        context = coarse_context(
            told if self.mode == "mask_only" else None, coarsened((label > 0).float(), spacing, cells)
        )
        noise = case_noise((1, 1, *cells), self.seed, f"coarse of {data['case']}").to(device)
        drawn = self.network.eval().draw(context.to(device), noise, self.times).cpu()
        if self.mode == "mask_only":
            surroundings = refined(drawn - told, size, spacing)
        else:  # exactly what `PaintPriord` adds, so that nothing of the mask stays
            surroundings = refined(drawn, size, spacing) - low_pass(painted, spacing)
        return {**data, "surroundings": on_grid_of(surroundings, data["label"])}

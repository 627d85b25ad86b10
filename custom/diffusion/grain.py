"""Dictionary transforms that take the grain off a scan, measure it, and put new grain on a rendering."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from custom.diffusion.noise import HU_RANGE, case_noise
from custom.volumes.grain import (
    draw_grain,
    fine_spectrum,
    gaussian_spectrum,
    grain_kernel,
    grain_spectrum,
    local_sd,
    with_grain,
)
from custom.volumes.grids import as_batch, on_grid_of, spacing_of
from custom.volumes.intensity import interior_noise_sd, split_noise
from monai.transforms import Transform

_LEAST_SHARE = 0.1  # of a spectrum, ours: where a structure lacks next to nothing, noise of few waves would be stripes


class SplitNoised(Transform):
    """Split an image into structure, which takes its place, and `grain`.

    Args:
        image_key, label_key: a pair on one grid, (1, H, W, D).
    """

    def __init__(self, image_key: str = "image", label_key: str = "label") -> None:
        self.image_key, self.label_key = image_key, label_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Split one item."""
        image, label = (as_batch(data[key])[0, 0].numpy() for key in (self.image_key, self.label_key))
        structure, grain = (
            on_grid_of(torch.from_numpy(part)[None, None], data[self.image_key]) for part in split_noise(image, label)
        )
        return {**data, self.image_key: structure, "grain": grain}


class MeasureGraind(Transform):
    """Measure what it takes to draw more grain like that of a scan, see `custom.volumes.grain.with_grain`.

    Reads what :class:`SplitNoised` made; adds `grain_spectrum` (1, 17, 17, 9), `grain_sd` (1, H, W, D) HU, and
    `noise_sd` of the scan, in HU.

    Args:
        image_key, label_key: as there.
    """

    def __init__(self, image_key: str = "image", label_key: str = "label") -> None:
        self.image_key, self.label_key = image_key, label_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Measure one item."""
        image, grain, label = (as_batch(data[k])[0, 0].numpy() for k in (self.image_key, "grain", self.label_key))
        return {
            **data,
            "grain_spectrum": torch.from_numpy(grain_spectrum(image, grain, label))[None],
            "grain_sd": on_grid_of(torch.from_numpy(local_sd(grain, label))[None, None], data["grain"]),
            "noise_sd": interior_noise_sd(image + grain, label),
        }


class NominalAppearanced(Transform):
    """Add what a template would tell of a scan's appearance, in nominal values: `statistics` and what makes its grain.

    Args:
        nominal_hu: mean of every label, background first.
        noise_sd_hu: of the grain, whose spectrum is that of a Gaussian; of phantoms, which have 15 to 41, the middle.
        blur_mm: standard deviation of that Gaussian, as of phantoms too.
    """

    def __init__(self, *, nominal_hu: Sequence[float], noise_sd_hu: float = 30.0, blur_mm: float = 0.3) -> None:
        self.nominal_hu, self.noise_sd_hu, self.blur_mm = list(nominal_hu), noise_sd_hu, blur_mm

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Complete one item, which holds `label`."""
        means = torch.tensor(self.nominal_hu, dtype=torch.float32)
        sigma = [self.blur_mm / edge for edge in spacing_of(data["label"])]
        return {
            **data,
            "statistics": torch.stack([means, torch.full_like(means, self.noise_sd_hu)], 1),
            "grain_spectrum": torch.from_numpy(gaussian_spectrum(self.noise_sd_hu, sigma))[None],
            "grain_sd": on_grid_of(torch.ones_like(as_batch(data["label"])), data["label"]),
            "noise_sd": self.noise_sd_hu,
        }


class AddGraind(Transform):
    """Put on a rendered structure the noise it lacks of its template: by its spectrum, strength and place, new phases.

    Needs `case`, `label`, and of the template, carried to the target, what :class:`MeasureGraind` adds. Of `label` the
    last channel counts: in the truth of `PrepareRendering` the scan comes before it.

    Args:
        key: the structure (1, H, W, D) HU, which becomes the image.
        factor: of the noise, 1 as the template, 0 none.
        seed: of the phases, which depend on it and the case alone.
        hu_range: limits of the image.
        structure_key: keeps the structure under another name; None drops it.

    Raises:
        ValueError: for a negative factor.
    """

    def __init__(
        self,
        key: str = "pred",
        *,
        factor: float = 1.0,
        seed: int = 0,
        hu_range: Sequence[float] = HU_RANGE,
        structure_key: str | None = None,
    ) -> None:
        if factor < 0:
            raise ValueError(f"grain: must be 0 (none) or more, 1 for that of the template, got {factor}")
        self.key, self.factor, self.seed = key, factor, seed
        (self.lowest_hu, self.highest_hu), self.structure_key = hu_range, structure_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Put grain on one item."""
        structure, label, strength = (as_batch(data[k])[0, -1].cpu().numpy() for k in (self.key, "label", "grain_sd"))
        spectrum = self.factor**2 * as_batch(data["grain_spectrum"])[0, 0].cpu().numpy()
        kernel = grain_kernel(np.maximum(spectrum - fine_spectrum(structure, label), _LEAST_SHARE * spectrum))
        size = [n + k - 1 for n, k in zip(structure.shape, kernel.shape, strict=True)]
        white = case_noise(size, self.seed, f"grain of {data['case']}").numpy()
        image = with_grain(
            structure,
            label,
            unit_grain=draw_grain(kernel, white),
            local_sd_hu=strength,
            noise_sd_hu=self.factor * float(data["noise_sd"]),
        ).clip(self.lowest_hu, self.highest_hu)
        kept: dict[Hashable, Any] = {} if self.structure_key is None else {self.structure_key: data[self.key]}
        return {**data, self.key: on_grid_of(torch.from_numpy(image)[None, None], data[self.key]), **kept}

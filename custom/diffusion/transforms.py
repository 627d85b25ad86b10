"""Dictionary transforms from (image, label) files to what the network reads."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from custom.diffusion.coarse import low_pass
from custom.diffusion.context import MODES, Context
from custom.diffusion.prior import bed_vessels, complete_statistics, fitted_template, paint_prior, template_background
from custom.geometry.deformation import sample
from custom.geometry.registration import template_coordinates
from custom.runs.files import content_hash
from custom.volumes.grids import as_batch, on_grid_of, sample_cubic, spacing_of
from custom.volumes.intensity import label_statistics
from custom.volumes.reading import file_of
from monai.networks.layers import GaussianFilter
from monai.transforms import Randomizable, Transform

logger = logging.getLogger(__name__)
_PSF_SIGMA_VOXELS = 0.5  # ours: the edge of a changed label is about as soft as a scan at 1.5 mm


class LabelStatisticsd(Transform):
    """Add `statistics` (num_labels, 2): mean and sd in HU of every label, NaN where absent.

    Args:
        image_key, label_key: a pair on one grid.
        num_labels: label ids 0 to num_labels - 1.
    """

    def __init__(self, image_key: str, label_key: str, *, num_labels: int) -> None:
        self.image_key, self.label_key, self.num_labels = image_key, label_key, num_labels

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Measure one item."""
        image, label = as_batch(data[self.image_key]), as_batch(data[self.label_key])
        return {**data, "statistics": label_statistics(image, label, self.num_labels)}


def shift_labels(label: torch.Tensor, shift_hu: torch.Tensor) -> torch.Tensor:
    """Change of each label, (num_labels,) HU, as a volume for ids (1, 1, H, W, D), softened at edges as by a scan."""
    return GaussianFilter(3, _PSF_SIGMA_VOXELS)(shift_hu[label.long()])


class VaryContrastd(Transform):
    """Render a template as if it had been scanned in another contrast phase, drawn for each case.

    All synthetic volumes of one template look like it. Shifts of whole labels, as in training, are what the generator
    has learnt to follow. Needs `statistics`, and `template_image` and `template_label` where there is a template;
    changes statistics and image. With one it adds `mean_change_hu` (num_labels,): by how much the label means change.

    Args:
        contrast_shift_hu: SD of a shift common to contrast-filled labels (those above `contrast_above_hu`).
        label_shift_hu: SD of a further shift of every label, or one SD for each label id, background first (that does
            not count): the contrast of the right heart varies most between patients. Background and texture stay.
        seed: of the draws, which depend on it and the name of the case alone.
        contrast_above_hu: see there.
        plausible_hu: label id -> lowest and highest mean that it can have, HU: shifts beyond are reflected there. A
            label that starts outside keeps its shift; ids that the label map lacks count for nothing, as in the gate.
            None: no limits.

    Raises:
        ValueError: for a negative deviation, a range whose ends are not in order, or another number of deviations than
            there are labels.
    """

    def __init__(
        self,
        *,
        contrast_shift_hu: float,
        label_shift_hu: float | Sequence[float],
        seed: int,
        contrast_above_hu: float = 200.0,
        plausible_hu: Mapping[int | str, Sequence[float]] | None = None,
    ) -> None:
        if contrast_shift_hu < 0 or np.min(label_shift_hu) < 0:
            raise ValueError(
                f"contrast_shift_hu, label_shift_hu: must not be negative, got {contrast_shift_hu}, {label_shift_hu}"
            )
        self.contrast_shift_hu, self.label_shift_hu = contrast_shift_hu, label_shift_hu
        self.seed, self.contrast_above_hu = seed, contrast_above_hu
        self.plausible_hu = {int(k): (float(low), float(high)) for k, (low, high) in (plausible_hu or {}).items()}
        for k, (low, high) in self.plausible_hu.items():
            if not low < high:
                raise ValueError(f"plausible_hu: label {k} needs a lowest below its highest mean, got {low} and {high}")

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Change the template of one item."""
        rng = np.random.default_rng(int(content_hash(f"contrast {self.seed}:{data['case']}".encode()), 16))
        means = data["statistics"][:, 0]
        if np.size(self.label_shift_hu) not in (1, len(means)):
            raise ValueError(
                f"label_shift_hu: needs one value, or one for each of {len(means)} labels with the background, got "
                f"{np.size(self.label_shift_hu)}"
            )
        shift = torch.as_tensor(rng.normal(0, self.label_shift_hu, len(means)), dtype=torch.float32)
        shift = shift + float(rng.normal(0, self.contrast_shift_hu)) * (means > self.contrast_above_hu)
        shift[0] = 0
        for k, (low, high) in self.plausible_hu.items():
            if k < len(means) and low <= means[k] <= high:
                along = (means[k] + shift[k] - low) % (2 * (high - low))  # up to the highest mean and back again
                shift[k] = low + torch.minimum(along, 2 * (high - low) - along) - means[k]
        if "template_image" not in data:
            return {**data, "statistics": data["statistics"] + shift[:, None] * torch.eye(2)[0]}
        image, label = as_batch(data["template_image"]), as_batch(data["template_label"])
        image = image + shift_labels(label, shift)
        statistics = label_statistics(image, label, len(means))
        return {
            **data,
            "template_image": on_grid_of(image, data["template_image"]),
            "statistics": statistics,
            "mean_change_hu": statistics[:, 0] - means,
        }


class AlignTemplated(Transform):
    """Carry `template_image` and `template_label` onto the grid and anatomy of the target mask `label`, training-free.

    Centroid and extent of the heart first, then a diffeomorphic registration of the label maps, applied with one
    interpolation. Both must already have the orientation and spacing of the target. `grain_sd` is carried along.

    Args:
        labels: ids that drive the alignment; leave tubular labels out.
    """

    def __init__(self, *, labels: Sequence[int]) -> None:
        self.labels = list(labels)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Align one item.

        Raises:
            ValueError: when template and target share none of the labels; names both files.
        """
        item = dict(data)
        template_label, target = as_batch(item["template_label"]), as_batch(item["label"])
        shared = set(template_label.unique().long().tolist()) & set(target.unique().long().tolist()) & set(self.labels)
        if not shared:
            raise ValueError(
                f"{file_of(item['label'])} and template {file_of(item['template_label'])} share none of the labels "
                f"{self.labels}; check the label mapping or choose another template"
            )
        where = template_coordinates(
            template_label.long(), target.long(), labels=self.labels, spacing_mm=spacing_of(item["label"])
        )
        item["template_image"] = on_grid_of(sample_cubic(as_batch(item["template_image"]), where), item["label"])
        item["template_label"] = on_grid_of(sample(template_label, where, mode="nearest"), item["label"])
        item["grain_sd"] = on_grid_of(sample(as_batch(item["grain_sd"]), where), item["label"])
        return item


class PaintPriord(Transform):
    """Add `prior` (1, H, W, D) HU and `context` (4, H, W, D), the channels of :class:`Context`.

    Needs `label` and `statistics`, on the grid of the label `template_image` and `template_label` in mode "template",
    and in the others `surroundings`, the low-pass part of the image less the painted mask (:class:`Surroundingsd` of a
    scan, :class:`DrawCoarsed` of a drawn one).

    Args:
        nominal_hu: plausible mean HU of every label, background first; paints what nothing else tells.
        mode: "template" (mask and template), "mask_only" or "unconditional".
        thin_labels: ids that are painted only, never shown in the template image (see `prior.fitted_template`).
        use_prior: False paints a constant instead of the template, for comparison (benchmarks/template_guidance.py).

    Raises:
        ValueError: on an unknown mode.
    """

    def __init__(
        self,
        *,
        nominal_hu: Sequence[float],
        mode: str = "template",
        thin_labels: Sequence[int] = (),
        use_prior: bool = True,
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"mode: must be one of {MODES}, got {mode!r}")
        self.nominal_hu, self.mode, self.use_prior = list(nominal_hu), mode, use_prior
        self.thin_labels = list(thin_labels)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Paint one item."""
        return self.paint(data, self.mode)

    def paint(self, data: Mapping[Hashable, Any], mode: str) -> dict[Hashable, Any]:
        """Paint one item in the given mode."""
        label = as_batch(data["label"])
        none = torch.full_like(label, -1)
        flat = torch.full_like(label, self.nominal_hu[0])
        target, template, template_label = label, torch.zeros_like(label), none
        prior = flat
        if mode == "template":
            template, template_label = as_batch(data["template_image"]), as_batch(data["template_label"])
        if mode == "template" and self.use_prior:
            spacing = spacing_of(data["label"])
            template = bed_vessels(template, template_label, label, self.thin_labels, spacing)
            background = template_background(template, template_label)
            prior = paint_prior(label, self._means(data, label), background)
            template = fitted_template(template, template_label, label, prior, self.thin_labels)
        elif self.use_prior:
            painted = paint_prior(label, self._means(data, label), flat)
            told = low_pass(painted, spacing_of(data["label"])) if mode == "unconditional" else painted
            prior = told + as_batch(data["surroundings"])
        if mode == "unconditional":
            target = none
        context = Context(target, template, template_label, prior).stacked()
        return {**data, "prior": on_grid_of(prior, data["label"]), "context": on_grid_of(context, data["label"])}

    def _means(self, data: Mapping[Hashable, Any], label: torch.Tensor) -> torch.Tensor:
        table, absent = complete_statistics(data["statistics"], self.nominal_hu)
        missing = sorted(set(absent) & set(label.unique().long().tolist()) - {0})
        if missing:
            logger.warning(
                "%s: the template shows no label %s; painted at its nominal HU, shifted to the template's contrast",
                file_of(data["label"]),
                missing,
            )
        return table[:, 0]


class RandPaintPriord(PaintPriord, Randomizable):
    """:class:`PaintPriord` with a random mode, so that one set of weights serves all three.

    Args:
        nominal_hu, thin_labels, use_prior: as there.
        mode_prob: probability of "template", "mask_only" and "unconditional".
    """

    def __init__(
        self,
        *,
        nominal_hu: Sequence[float],
        mode_prob: Sequence[float] = (0.85, 0.15, 0.0),
        thin_labels: Sequence[int] = (),
        use_prior: bool = True,
    ) -> None:
        super().__init__(nominal_hu=nominal_hu, thin_labels=thin_labels, use_prior=use_prior)
        if len(mode_prob) != len(MODES) or abs(sum(mode_prob) - 1) > 1e-6 or min(mode_prob) < 0:
            raise ValueError(f"mode_prob: one probability for each of {MODES}, summing to 1, got {list(mode_prob)}")
        self.mode_prob = list(mode_prob)

    def randomize(self, data: Any = None) -> None:
        """Draw the mode."""
        self.mode = str(self.R.choice(MODES, p=self.mode_prob))

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Draw a mode and paint one item."""
        self.randomize()
        return self.paint(data, self.mode)

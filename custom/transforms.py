"""Layer 2: dictionary transforms from (image, label) files to what the network reads."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.networks.layers import GaussianFilter
from monai.transforms import MapTransform, Randomizable, Transform
from scipy import ndimage

from custom.deformation import identity_coordinates, random_velocity, sample
from custom.networks import MODES
from custom.registration import template_coordinates
from custom.template import (
    complete_statistics,
    label_statistics,
    noise_sd,
    paint_prior,
    split_noise,
    surrogate_grain,
    template_background,
)

logger = logging.getLogger(__name__)

_PSF_SIGMA_VOXELS = 0.5


def _file_of(volume: Any) -> str:
    return str(getattr(volume, "meta", {}).get("filename_or_obj", "volume without a file"))


def _plain(volume: torch.Tensor) -> torch.Tensor:
    """(1, H, W, D), MetaTensor or not -> plain float (1, 1, H, W, D)."""
    return torch.as_tensor(volume).as_subclass(torch.Tensor).float()[None]


def _like(volume: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """(1, 1, H, W, D) -> (1, H, W, D) on the grid of a reference."""
    return MetaTensor(volume[0], meta=reference.meta) if isinstance(reference, MetaTensor) else volume[0]


def _sample_cubic(volume: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    """Image (1, 1, h, w, d) read at (1, 3, H, W, D) voxels of it by cubic splines, edge values outside."""
    values = ndimage.map_coordinates(volume[0, 0].numpy(), where[0].numpy(), order=3, mode="nearest")
    return torch.from_numpy(values)[None, None]


def _sample_labels(label: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    """Label map read at (1, 3, H, W, D) voxels of it without staircases: the label with most linear weight wins."""
    best, winner = torch.zeros_like(where[:, :1]), torch.zeros_like(where[:, :1])
    for index in sample(label, where, mode="nearest").unique().tolist():
        weight = sample((label == index).float(), where)
        winner = torch.where(weight > best, float(index), winner)
        best = torch.maximum(best, weight)
    return winner


class CheckVolumesd(MapTransform):
    """Refuse volumes that would train or render nonsense, naming the file and the rule. Changes nothing.

    Args:
        keys: all volumes to check.
        label_keys: those of `keys` that are label maps, already mapped to the ids of the model.
        num_labels: label ids 0 to num_labels - 1.
        spacing_mm: spacing of the model; None leaves the spacing unchecked.
        air_below_hu: an image without any voxel below this is not in HU (8-bit, unsigned or normalised data).
        grids: pairs of keys that must share one grid.

    Raises:
        ValueError: naming file, rule, value and remedy.
    """

    _MAX_SPACING_RATIO = 3.0
    _HU_LIMITS = (-4000.0, 40000.0)

    def __init__(
        self,
        keys: KeysCollection,
        *,
        label_keys: Sequence[str],
        num_labels: int,
        spacing_mm: Sequence[float] | None = None,
        air_below_hu: float = -150.0,
        grids: Sequence[Sequence[str]] = (),
    ) -> None:
        super().__init__(keys)
        self.label_keys, self.num_labels, self.spacing_mm = set(label_keys), num_labels, spacing_mm
        self.air_below_hu, self.grids = air_below_hu, grids

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Check the volumes of one item, each (C, H, W, D)."""
        for key in self.key_iterator(data):
            self._check_form(data[key])
            if key in self.label_keys:
                self._check_label(data[key])
            else:
                self._check_image(data[key])
        for first, second in self.grids:
            self._check_grid(data[first], data[second])
        return dict(data)

    def _check_form(self, volume: Any) -> None:
        if volume.ndim != 4 or volume.shape[0] != 1:
            raise ValueError(
                f"{_file_of(volume)}: must be one 3D volume of one channel, got channels and size {tuple(volume.shape)}; "
                "split time series and convert colour images first"
            )
        if not bool(torch.isfinite(torch.as_tensor(volume)).all()):
            raise ValueError(f"{_file_of(volume)}: holds NaN or infinite voxels; replace them before use")
        if self.spacing_mm is None or not isinstance(volume, MetaTensor):
            return
        ratio = (volume.pixdim.float() / torch.tensor(self.spacing_mm).float()).max().item()
        if ratio > self._MAX_SPACING_RATIO:
            raise ValueError(
                f"{_file_of(volume)}: spacing {volume.pixdim.tolist()} mm is {ratio:.1f} times the model's "
                f"{list(self.spacing_mm)} mm; at most {self._MAX_SPACING_RATIO:g} times is possible, use finer data"
            )

    def _check_image(self, image: Any) -> None:
        low, high = float(image.min()), float(image.max())
        if low == high:
            raise ValueError(f"{_file_of(image)}: every voxel is {low:g}; a constant image cannot be used")
        if low > self.air_below_hu or low < self._HU_LIMITS[0] or high > self._HU_LIMITS[1]:
            raise ValueError(
                f"{_file_of(image)}: values {low:g} to {high:g} are not Hounsfield units: the minimum must lie between "
                f"{self._HU_LIMITS[0]:g} and {self.air_below_hu:g} and the maximum below {self._HU_LIMITS[1]:g}; "
                "apply the rescale slope and intercept, and do not window or normalise"
            )

    def _check_label(self, label: Any) -> None:
        ids = torch.unique(torch.as_tensor(label)).tolist()
        if any(i != int(i) for i in ids):
            raise ValueError(f"{_file_of(label)}: label ids must be integers, got {[i for i in ids if i != int(i)][:5]}")
        unknown = [int(i) for i in ids if not 0 <= i < self.num_labels]
        if unknown:
            raise ValueError(
                f"{_file_of(label)}: label ids {unknown} are not in the label map 0 to {self.num_labels - 1}; "
                "map or drop them with `label_mapping` in the config"
            )
        if ids == [0]:
            raise ValueError(f"{_file_of(label)}: the mask is empty; every case needs at least one label")

    def _check_grid(self, first: Any, second: Any) -> None:
        same = first.shape[1:] == second.shape[1:]
        if same and isinstance(first, MetaTensor) and isinstance(second, MetaTensor):
            same = torch.allclose(first.affine, second.affine, atol=1e-2)
        if not same:
            raise ValueError(
                f"{_file_of(first)} and {_file_of(second)}: image and mask must share one grid, got sizes "
                f"{tuple(first.shape[1:])} and {tuple(second.shape[1:])} or different affines; resample the mask"
            )


class SplitNoised(Transform):
    """Add `structure`, the image without its grain, and `surrogate`, grain to put on it, to an item with `image`, `label`."""

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Split `image` (1, H, W, D)."""
        item = dict(data)
        image, label = _plain(item["image"])[0, 0].numpy(), _plain(item["label"])[0, 0].numpy()
        structure, grain = split_noise(image, label)
        for key, volume in (("structure", structure), ("surrogate", surrogate_grain(grain, label))):
            item[key] = _like(torch.from_numpy(volume)[None, None], item["image"])
        return item


class LabelStatisticsd(Transform):
    """Add `statistics` (num_labels, 2): mean and sd in HU of every label, NaN where absent, and `grain_sd` in HU.

    Args:
        image_key, label_key: a pair on one grid.
        num_labels: label ids 0 to num_labels - 1.
    """

    def __init__(self, image_key: str, label_key: str, *, num_labels: int) -> None:
        self.image_key, self.label_key, self.num_labels = image_key, label_key, num_labels

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Measure one item."""
        image, label = _plain(data[self.image_key]), _plain(data[self.label_key])
        statistics = label_statistics(image, label, self.num_labels)
        return {**data, "statistics": statistics, "grain_sd": noise_sd(image[0, 0].numpy(), label[0, 0].numpy())}


class AlignTemplated(Transform):
    """Carry `template_image` and `template_label` onto the grid and anatomy of the target mask `label`, training-free.

    Centroid and extent of the heart first, then a diffeomorphic registration of the label maps, applied with one
    interpolation. Both must already have the orientation and spacing of the target.

    Args:
        labels: ids that drive the alignment; leave tubular labels out.
        spacing_mm: spacing of all three volumes.
    """

    def __init__(self, *, labels: Sequence[int], spacing_mm: Sequence[float]) -> None:
        self.labels, self.spacing_mm = list(labels), spacing_mm

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Align one item.

        Raises:
            ValueError: when template and target share none of the labels; names both files.
        """
        item = dict(data)
        template_label, target = _plain(item["template_label"]), _plain(item["label"])
        shared = set(template_label.unique().long().tolist()) & set(target.unique().long().tolist()) & set(self.labels)
        if not shared:
            raise ValueError(
                f"{_file_of(item['label'])} and template {_file_of(item['template_label'])} share none of the labels "
                f"{self.labels}; check the label mapping or choose another template"
            )
        where = template_coordinates(
            template_label.long(), target.long(), labels=self.labels, spacing_mm=self.spacing_mm
        )
        item["template_image"] = _like(_sample_cubic(_plain(item["template_image"]), where), item["label"])
        item["template_label"] = _like(sample(template_label, where, mode="nearest"), item["label"])
        return item


class PaintPriord(Transform):
    """Add `prior` (1, H, W, D) HU and `context` (6, H, W, D), see `custom.networks.CONTEXT_CHANNELS`.

    Needs `label`, `template_image`, `template_label` on one grid, `statistics` and `grain_sd` of the template.

    Args:
        nominal_hu: plausible mean HU of every label, background first; paints what no template tells.
        mode: "template" (mask and template), "mask_only" or "unconditional".
        use_prior: False paints a constant instead of the template, for comparison (benchmarks/template_guidance.py).

    Raises:
        ValueError: on an unknown mode.
    """

    def __init__(self, *, nominal_hu: Sequence[float], mode: str = "template", use_prior: bool = True) -> None:
        if mode not in MODES:
            raise ValueError(f"mode: must be one of {MODES}, got {mode!r}")
        self.nominal_hu, self.mode, self.use_prior = list(nominal_hu), mode, use_prior

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Paint one item."""
        return self.paint(data, self.mode)

    def paint(self, data: Mapping[Hashable, Any], mode: str) -> dict[Hashable, Any]:
        """Paint one item in the given mode."""
        label = _plain(data["label"])
        none = torch.full_like(label, -1)
        flat = torch.full_like(label, self.nominal_hu[0])
        target, template, template_label = label, torch.zeros_like(label), none
        prior, sd = flat, torch.zeros_like(label)
        if mode == "template":
            template, template_label = _plain(data["template_image"]), _plain(data["template_label"])
        if mode == "template" and self.use_prior:
            background = template_background(template, template_label)
            prior, sd = paint_prior(label, self._statistics(data, label), background, float(data["grain_sd"]))
        elif mode == "mask_only" and self.use_prior:
            table = torch.tensor(self.nominal_hu)[:, None].expand(-1, 2) * torch.tensor([1.0, 0.0])
            prior, sd = paint_prior(label, table, flat, 0.0)
        elif mode == "unconditional":
            target = none
        grain = torch.full_like(label, float(data["grain_sd"]) if mode == "template" else 0.0)
        context = torch.cat([target, template, template_label, prior, sd, grain], 1)
        return {**data, "prior": _like(prior, data["label"]), "context": _like(context, data["label"])}

    def _statistics(self, data: Mapping[Hashable, Any], label: torch.Tensor) -> torch.Tensor:
        table, absent = complete_statistics(data["statistics"], self.nominal_hu)
        missing = sorted(set(absent) & set(label.unique().long().tolist()) - {0})
        if missing:
            logger.warning(
                "%s: the template shows no label %s; painted at its nominal HU, shifted to the template's contrast",
                _file_of(data["label"]),
                missing,
            )
        return table


class RandPaintPriord(PaintPriord, Randomizable):
    """:class:`PaintPriord` with a random mode, so that one set of weights serves all three.

    Args:
        nominal_hu, use_prior: as there.
        mode_prob: probability of "template", "mask_only" and "unconditional".
    """

    def __init__(
        self, *, nominal_hu: Sequence[float], mode_prob: Sequence[float] = (0.85, 0.1, 0.05), use_prior: bool = True
    ) -> None:
        super().__init__(nominal_hu=nominal_hu, use_prior=use_prior)
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


class RandTemplatePaird(Randomizable, Transform):
    """Make a training pair (target, template of the same appearance) from one subject.

    A template of another subject would be ignored, so the template is an independently deformed copy of the target's own
    subject under the same random appearance: the only way to get the intensities right is to read it. What separates the
    two anatomies stands for what registration leaves over when a template is used on another heart. The template's own
    grain is replaced by surrogate grain, so that grain cannot be traced from template to target. Images are read by cubic
    splines, which keep thin vessels and grain where linear interpolation would blur them.

    Reads `image`, `structure`, `surrogate`, `label`, `statistics`, `grain_sd`; writes `image`, `label`, `template_image`, `template_label`,
    `statistics` and `grain_sd` (of the template). The fields are small against their length, so they do not fold and
    need no exponential.

    Args:
        spacing_mm: spacing of the volumes.
        roi_size: size of the pair, cut from the centre of what comes in (which should be larger by the deformation);
            None keeps the whole volume.
        target_amplitude_mm: RMS displacement of the target's own deformation.
        template_amplitude_mm: range of the RMS displacement between template and target.
        sigma_mm: correlation length of the deformations.
        undeformed_prob: probability of taking the target as it was scanned.
        contrast_shift_hu: SD of a shift common to contrast-filled labels (those above `contrast_above_hu`).
        label_shift_hu: SD of a further shift of every label.
        contrast_above_hu: see there.
        grain_gain: range of the factor on the grain.
        blur_voxels: range of an additional Gaussian blur of the structure.

    Raises:
        ValueError: when the volume is smaller than the ROI.
    """

    def __init__(
        self,
        *,
        spacing_mm: Sequence[float],
        roi_size: Sequence[int] | None = None,
        target_amplitude_mm: float = 5.0,
        template_amplitude_mm: Sequence[float] = (0.0, 6.0),
        sigma_mm: float = 25.0,
        undeformed_prob: float = 0.4,
        contrast_shift_hu: float = 70.0,
        label_shift_hu: float = 20.0,
        contrast_above_hu: float = 200.0,
        grain_gain: Sequence[float] = (0.8, 1.3),
        blur_voxels: Sequence[float] = (0.0, 0.3),
    ) -> None:
        self.spacing_mm, self.sigma_mm = list(spacing_mm), sigma_mm
        self.roi_size = None if roi_size is None else list(roi_size)
        self.target_amplitude_mm, self.template_amplitude_mm = target_amplitude_mm, template_amplitude_mm
        self.undeformed_prob = undeformed_prob
        self.contrast_shift_hu, self.label_shift_hu = contrast_shift_hu, label_shift_hu
        self.contrast_above_hu, self.grain_gain, self.blur_voxels = contrast_above_hu, grain_gain, blur_voxels

    def randomize(self, num_labels: int) -> None:
        """Draw everything that is random about one pair."""
        self._deformed = bool(self.R.rand() >= self.undeformed_prob)
        self._amplitude_mm = float(self.R.uniform(*self.template_amplitude_mm))
        self._contrast_shift = self.R.normal(0, self.contrast_shift_hu)
        self._label_shift = self.R.normal(0, self.label_shift_hu, num_labels)
        self._gain = float(self.R.uniform(*self.grain_gain))
        self._blur = float(self.R.uniform(*self.blur_voxels))
        self._roll = self.R.randint(0, 1 << 16, 3).tolist()
        self._seed = int(self.R.randint(0, 1 << 31))

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Make one pair from volumes (1, H, W, D)."""
        item = dict(data)
        size = item["label"].shape[1:]
        if self.roi_size is not None and any(n < r for n, r in zip(size, self.roi_size, strict=True)):
            raise ValueError(
                f"{_file_of(item['label'])}: {tuple(size)} voxels at the model's spacing are fewer than the ROI "
                f"{tuple(self.roi_size)}; lower `roi_size` or use a larger field of view"
            )
        self.randomize(len(item["statistics"]))
        label, surrogate = _plain(item["label"]), _plain(item["surrogate"]) * self._gain
        shifts, shift = self._shifts(label, item["statistics"])
        structure = self._blurred(_plain(item["structure"]) + shifts)
        grain = _plain(item["image"]) - _plain(item["structure"])
        scanned = structure + grain * self._gain
        target_at, template_at = self._coordinates(size)
        centre = (..., *(slice((n - r) // 2, (n - r) // 2 + r) for n, r in zip(size, self.roi_size or size, strict=True)))
        where = template_at[centre]
        template = _sample_cubic(structure, where) + torch.roll(surrogate, self._roll, (2, 3, 4))[centre]
        template_label = sample(label, where, mode="nearest")
        if self._deformed:
            image, target_label = _sample_cubic(scanned, target_at[centre]), _sample_labels(label, target_at[centre])
        else:
            image, target_label = scanned[centre], label[centre]
        statistics = label_statistics(scanned, label, len(shift))
        fallback = item["statistics"] + shift[:, None] * torch.eye(2)[0]
        for key in ("structure", "surrogate"):
            item.pop(key)
        return {
            **item,
            "image": image[0],
            "label": target_label[0],
            "template_image": template[0],
            "template_label": template_label[0],
            "statistics": torch.where(statistics.isfinite(), statistics, fallback),
            "grain_sd": float(item["grain_sd"]) * self._gain,
        }

    def _shifts(self, label: torch.Tensor, statistics: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Drawn contrast change as a volume, softened like a scan, and by label, (num_labels,); HU."""
        shift = torch.as_tensor(self._label_shift, dtype=torch.float32)
        shift = shift + self._contrast_shift * (statistics[:, 0] > self.contrast_above_hu)
        shift[0] = 0
        return GaussianFilter(3, _PSF_SIGMA_VOXELS)(shift[label.long()]), shift

    def _blurred(self, structure: torch.Tensor) -> torch.Tensor:
        return GaussianFilter(3, self._blur)(structure) if self._blur > 0.05 else structure

    def _coordinates(self, size: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Where target and template read the subject, each (1, 3, H, W, D) in voxels."""
        generator = torch.Generator().manual_seed(self._seed)

        def displacement(amplitude_mm: float) -> torch.Tensor:
            return random_velocity(
                size, spacing_mm=self.spacing_mm, sigma_mm=self.sigma_mm, amplitude_mm=amplitude_mm, generator=generator
            )

        target = identity_coordinates(size)
        if self._deformed:
            target = target + displacement(self.target_amplitude_mm)
        return target, target + displacement(self._amplitude_mm)

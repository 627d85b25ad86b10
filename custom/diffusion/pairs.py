"""Training pairs from single subjects."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

import torch
from custom.diffusion.transforms import shift_labels
from custom.geometry.deformation import identity_coordinates, random_velocity, sample, sample_labels
from custom.volumes.grids import (
    as_batch,
    crop,
    crop_to,
    on_device,
    on_grid_of,
    pad_to_multiple,
    sample_cubic,
    spacing_of,
)
from custom.volumes.intensity import label_statistics
from custom.volumes.reading import file_of
from monai.data import DataLoader
from monai.networks.layers import GaussianFilter
from monai.transforms import Randomizable, Transform
from torch.nn import functional as F

_BLOCK = 4  # voxels, ours: the field is smooth over 12 mm, so a coarse grid serves and costs a 64th


def near_labels(label: torch.Tensor, reach_mm: float, spacing_mm: Sequence[float]) -> torch.Tensor:
    """1 in and at large labelled regions, less at thin or cut-off ones, 0 beyond about twice `reach_mm`.

    Args:
        label: (1, 1, H, W, D) ids.
        reach_mm: standard deviation of the Gaussian that spreads the labels.
        spacing_mm: voxel size along each axis.
    """
    padded = pad_to_multiple((label > 0).float(), _BLOCK)
    sigma = [reach_mm / s / _BLOCK for s in spacing_mm]
    spread = GaussianFilter(3, sigma)(F.avg_pool3d(padded, _BLOCK))
    spread = F.interpolate(spread, padded.shape[2:], mode="trilinear", align_corners=False)
    return crop_to((2 * spread).clamp(max=1), label.shape[2:])


class RandTemplatePaird(Randomizable, Transform):
    """Make a training pair (target, template of the same appearance) from one subject.

    A template of another subject would be ignored, so the template is an independently deformed copy of the target's
    own subject under the same random appearance: the only way to get the intensities right is to read it. What
    separates the two anatomies stands for what registration leaves over when a template is used on another heart. It
    fades away from the labels: there the mask asks for nothing, and whatever an aligned template shows is right.
    Images are read by cubic splines, which keep thin vessels where linear interpolation would blur them.

    Reads `image` (structure), `label` and `statistics`; writes `image`, `label`, `template_image`, `template_label` and
    `statistics` (of the template), and `surroundings`, where there are some, of the target. With `grain`, `scan` is the
    target with its own grain, to measure against. The
    fields are small against their length, so they do not fold and need no exponential.

    Args:
        roi_size: size of the pair, cut from the centre of what comes in (which should be larger by the deformation);
            None keeps the whole volume.
        target_amplitude_mm: RMS displacement of the target's own deformation.
        template_amplitude_mm: range of the RMS displacement between template and target.
        sigma_mm: correlation length of the deformations.
        reach_mm: distance from the labels over which template and target come to agree.
        undeformed_prob: probability of taking the target as it was scanned.
        contrast_shift_hu: SD of a shift common to contrast-filled labels (those above `contrast_above_hu`).
        label_shift_hu: SD of a further shift of every label.
        contrast_above_hu: see there.
        blur_voxels: range of an additional Gaussian blur of the structure.

    Raises:
        ValueError: when the volume is smaller than the ROI.
    """

    def __init__(
        self,
        *,
        roi_size: Sequence[int] | None = None,
        target_amplitude_mm: float = 5.0,
        template_amplitude_mm: Sequence[float] = (0.0, 5.0),
        sigma_mm: float = 25.0,
        reach_mm: float = 12.0,
        undeformed_prob: float = 0.4,
        contrast_shift_hu: float = 70.0,
        label_shift_hu: float = 20.0,
        contrast_above_hu: float = 200.0,
        blur_voxels: Sequence[float] = (0.0, 0.3),
    ) -> None:
        self.sigma_mm = sigma_mm
        self.roi_size = None if roi_size is None else list(roi_size)
        self.target_amplitude_mm, self.template_amplitude_mm = target_amplitude_mm, template_amplitude_mm
        self.reach_mm, self.undeformed_prob = reach_mm, undeformed_prob
        self.contrast_shift_hu, self.label_shift_hu = contrast_shift_hu, label_shift_hu
        self.contrast_above_hu, self.blur_voxels = contrast_above_hu, blur_voxels

    def randomize(self, num_labels: int) -> None:
        """Draw everything that is random about one pair."""
        self._deformed = bool(self.R.rand() >= self.undeformed_prob)
        self._amplitude_mm = float(self.R.uniform(self.template_amplitude_mm[0], self.template_amplitude_mm[1]))
        self._contrast_shift = self.R.normal(0, self.contrast_shift_hu)
        self._label_shift = self.R.normal(0, self.label_shift_hu, num_labels)
        self._blur = float(self.R.uniform(self.blur_voxels[0], self.blur_voxels[1]))
        self._seed = int(self.R.randint(0, 1 << 31))

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Make one pair from volumes (1, H, W, D)."""
        item = dict(data)
        size = item["label"].shape[1:]
        if self.roi_size is not None and any(n < r for n, r in zip(size, self.roi_size, strict=True)):
            raise ValueError(
                f"{file_of(item['label'])}: {tuple(size)} voxels at the model's spacing are fewer than the ROI "
                f"{tuple(self.roi_size)}; lower `roi_size` or use a larger field of view"
            )
        self.randomize(len(item["statistics"]))
        label = as_batch(item["label"])
        shifts, shift = self._shifts(label, item["statistics"])
        structure = self._blurred(as_batch(item["image"]) + shifts)
        target_at, template_at = self._coordinates(label, spacing_of(item["label"]))
        roi = self.roi_size or size
        centre = [slice((n - r) // 2, (n - r) // 2 + r) for n, r in zip(size, roi, strict=True)]
        where = crop(template_at, centre)

        def target(volume: torch.Tensor) -> torch.Tensor:
            return sample_cubic(volume, crop(target_at, centre)) if self._deformed else crop(volume, centre)

        target_label = sample_labels(label, crop(target_at, centre)) if self._deformed else crop(label, centre)
        scan: dict[Hashable, Any] = (
            {"scan": target(structure + as_batch(item.pop("grain")))[0]} if "grain" in item else {}
        )
        if "surroundings" in item:
            scan["surroundings"] = target(as_batch(item["surroundings"]))[0]
        statistics = label_statistics(structure, label, len(shift))
        fallback = item["statistics"] + shift[:, None] * torch.eye(2)[0]
        return {
            **item,
            **scan,
            "image": target(structure)[0],
            "label": on_grid_of(target_label, item["label"]),
            "template_image": sample_cubic(structure, where)[0],
            "template_label": sample(label, where, mode="nearest")[0],
            "statistics": torch.where(statistics.isfinite(), statistics, fallback),
        }

    def _shifts(self, label: torch.Tensor, statistics: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Drawn contrast change as a volume, softened like a scan, and by label, (num_labels,); HU."""
        shift = torch.as_tensor(self._label_shift, dtype=torch.float32)
        shift = shift + self._contrast_shift * (statistics[:, 0] > self.contrast_above_hu)
        shift[0] = 0
        return shift_labels(label, shift), shift

    def _blurred(self, structure: torch.Tensor) -> torch.Tensor:
        return GaussianFilter(3, self._blur)(structure) if self._blur > 0.05 else structure

    def _coordinates(self, label: torch.Tensor, spacing_mm: Sequence[float]) -> tuple[torch.Tensor, torch.Tensor]:
        """Where target and template read the subject, each (1, 3, H, W, D) in voxels."""
        size = label.shape[2:]
        generator = torch.Generator().manual_seed(self._seed)

        def displacement(amplitude_mm: float) -> torch.Tensor:
            return random_velocity(
                size, spacing_mm=spacing_mm, sigma_mm=self.sigma_mm, amplitude_mm=amplitude_mm, generator=generator
            )

        target = identity_coordinates(size)
        near = near_labels(label, self.reach_mm, spacing_mm)
        if self._deformed:
            target = target + displacement(self.target_amplitude_mm)
            near = sample(near, target)
        return target, target + near * displacement(self._amplitude_mm)


class PooledDataLoader(DataLoader):
    """MONAI's `DataLoader` of training pairs, each used several times: making one costs as much as a training step.

    Of every batch that is made, `uses` are drawn: itself, then pairs of all that this epoch has made so far. Noise and
    time of the diffusion are drawn anew for each. The pool is emptied when an epoch begins, so that an epoch follows
    from its seed alone.

    Args:
        dataset: whose items hold the tensors `keys`.
        uses: at least 1, which keeps no pool.
        device: where the pool is kept.
        kept: pairs that the pool holds at most; the oldest go first.
        keys: what a training step reads; all else is left out.
        kwargs: of `DataLoader`.
    """

    def __init__(
        self,
        dataset: Any,
        *,
        uses: int = 1,
        device: Any = "cpu",
        kept: int = 4096,
        keys: Sequence[str] = ("image", "prior", "context", "label"),
        **kwargs: Any,
    ) -> None:
        super().__init__(dataset, **kwargs)
        self.uses, self.kept, self.keys = uses, kept, tuple(keys)
        self.pool_device = torch.device(device)

    def __len__(self) -> int:
        """Batches of an epoch."""
        return self.uses * super().__len__()

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:  # type: ignore[override]
        """Batches of an epoch; what is drawn follows torch's global generator."""
        pool: dict[str, torch.Tensor] = {}
        made, held = 0, min(self.kept, super().__len__() * (self.batch_size or 1))
        for item in super().__iter__():
            batch = {key: on_device(item, key, self.pool_device) for key in self.keys}
            yield batch
            if self.uses == 1:
                continue
            size = len(batch[self.keys[0]])
            pool = pool or {key: value.new_empty(held, *value.shape[1:]) for key, value in batch.items()}
            places = torch.arange(made, made + size, device=self.pool_device) % held
            for key, value in batch.items():
                pool[key][places] = value
            made += size
            for _ in range(self.uses - 1):
                rows = torch.randint(min(made, held), (size,)).to(self.pool_device)
                yield {key: value[rows] for key, value in pool.items()}

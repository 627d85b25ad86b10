"""Layer 2: refusing volumes that would train or render nonsense."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform


def file_of(volume: Any) -> str:
    """Name of the file a volume was read from."""
    return str(getattr(volume, "meta", {}).get("filename_or_obj", "volume without a file"))


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
                f"{file_of(volume)}: must be one 3D volume of one channel, got channels and size "
                f"{tuple(volume.shape)}; "
                "split time series and convert colour images first"
            )
        if not bool(torch.isfinite(torch.as_tensor(volume)).all()):
            raise ValueError(f"{file_of(volume)}: holds NaN or infinite voxels; replace them before use")
        if self.spacing_mm is None or not isinstance(volume, MetaTensor):
            return
        ratio = (volume.pixdim.float() / torch.tensor(self.spacing_mm).float()).max().item()
        if ratio > self._MAX_SPACING_RATIO:
            raise ValueError(
                f"{file_of(volume)}: spacing {volume.pixdim.tolist()} mm is {ratio:.1f} times the model's "
                f"{list(self.spacing_mm)} mm; at most {self._MAX_SPACING_RATIO:g} times is possible, use finer data"
            )

    def _check_image(self, image: Any) -> None:
        low, high = float(image.min()), float(image.max())
        if low == high:
            raise ValueError(f"{file_of(image)}: every voxel is {low:g}; a constant image cannot be used")
        if low > self.air_below_hu or low < self._HU_LIMITS[0] or high > self._HU_LIMITS[1]:
            raise ValueError(
                f"{file_of(image)}: values {low:g} to {high:g} are not Hounsfield units: the minimum must lie between "
                f"{self._HU_LIMITS[0]:g} and {self.air_below_hu:g} and the maximum below {self._HU_LIMITS[1]:g}; "
                "apply the rescale slope and intercept, and do not window or normalise"
            )

    def _check_label(self, label: Any) -> None:
        ids = torch.unique(torch.as_tensor(label)).tolist()
        if any(i != int(i) for i in ids):
            raise ValueError(f"{file_of(label)}: label ids must be integers, got {[i for i in ids if i != int(i)][:5]}")
        unknown = [int(i) for i in ids if not 0 <= i < self.num_labels]
        if unknown:
            raise ValueError(
                f"{file_of(label)}: label ids {unknown} are not in the label map 0 to {self.num_labels - 1}; "
                "map or drop them with `label_mapping` in the config"
            )
        if ids == [0]:
            raise ValueError(f"{file_of(label)}: the mask is empty; every case needs at least one label")

    def _check_grid(self, first: Any, second: Any) -> None:
        same = first.shape[1:] == second.shape[1:]
        if same and isinstance(first, MetaTensor) and isinstance(second, MetaTensor):
            same = torch.allclose(first.affine, second.affine, atol=1e-2)
        if not same:
            raise ValueError(
                f"{file_of(first)} and {file_of(second)}: image and mask must share one grid, got sizes "
                f"{tuple(first.shape[1:])} and {tuple(second.shape[1:])} or different affines; resample the mask"
            )

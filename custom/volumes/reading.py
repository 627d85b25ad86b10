"""Reading volumes, and refusing those that would train or render nonsense."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import nibabel as nib
import numpy as np
import torch
from custom.volumes.headers import TOLERANCE_VOXELS, check_ending, check_header, corners_apart_mm
from custom.volumes.numbering import MapLabelsd, check_mapping, is_mapped, mapped_key
from custom.volumes.resampling import ToSpacingd, check_lengths
from monai.config import KeysCollection
from monai.data import MetaTensor, NibabelReader
from monai.transforms import Compose, EnsureChannelFirstd, EnsureTyped, LoadImage, MapTransform, Orientationd, Transform
from nibabel.orientations import io_orientation


def file_of(volume: Any) -> str:
    """Name of the file a volume was read from."""
    return str(getattr(volume, "meta", {}).get("filename_or_obj", "volume without a file"))


def check_grid(first: Any, second: Any) -> None:
    """Refuse two volumes (C, H, W, D) that are not on one grid.

    Raises:
        ValueError: naming both files and what differs.
    """
    sizes, differ = (tuple(first.shape[1:]), tuple(second.shape[1:])), ""
    if sizes[0] != sizes[1]:
        differ = f"sizes {sizes[0]} and {sizes[1]}"
    elif isinstance(first, MetaTensor) and isinstance(second, MetaTensor):
        apart = corners_apart_mm(sizes[0], first.affine, second.affine)
        if not apart <= TOLERANCE_VOXELS * float(first.pixdim.min()):
            differ = f"affines that put a corner {apart:.3g} mm apart"
    if differ:
        raise ValueError(
            f"{file_of(first)} and {file_of(second)}: they must share one grid, got {differ}; resample the second"
        )


class _Opened(NibabelReader):
    """Gives MONAI a file that is open: its own `read` takes another affine where voxel sizes are off by a rounding."""

    def __init__(self, image: Any) -> None:
        super().__init__()
        self.image = image

    def read(self, data: Any, **kwargs: Any) -> Any:
        """The image."""
        self.filenames = data
        return self.image


@contextmanager
def _naming(file: str) -> Iterator[None]:
    """Errors of whatever reads a file, with its name: nibabel, gzip, zlib and numpy give none."""
    try:
        yield
    except (FileNotFoundError, PermissionError, MemoryError):  # these say what is the matter
        raise
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{file}: cannot be read as a volume of numbers ({reason}); "
            "the file is damaged or holds colours, copy or convert it anew"
        ) from error


class LoadVolumesd(MapTransform):
    """`LoadImaged` for NIfTI, (H, W, D) of (H, W, D, 1) too, that names the file in errors and checks its header.

    Args:
        keys: files to read.

    Raises:
        FileNotFoundError: naming the missing file.
        ValueError: naming the file that is no NIfTI, unreadable, or whose header contradicts itself, and the reason.
    """

    def __init__(self, keys: KeysCollection) -> None:
        super().__init__(keys)
        self.load = LoadImage(image_only=True)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Read the volumes of one item."""
        item = dict(data)
        for key in self.key_iterator(item):
            file = str(item[key])
            check_ending(file)
            with _naming(file):
                image = nib.load(file)
            check_header(image, file)
            with _naming(file):
                item[key] = self.load(file, reader=_Opened(nib.squeeze_image(image)))
        return item


class CheckVolumesd(MapTransform):
    """Refuse volumes that would train or render nonsense, naming the file and the rule. Changes nothing.

    Args:
        keys: all volumes to check.
        label_keys: those of `keys` that are label maps, already mapped to the ids of the model.
        num_labels: label ids 0 to num_labels - 1.
        spacing_mm: spacing of the model along the axes of RAS, or its finest and coarsest, of which the coarsest is
            compared; None leaves the spacing unchecked.
        air_below_hu: an image without any voxel below this is not in HU (8-bit, unsigned or normalised data).
        grids: pairs of keys that must share one grid.

    Raises:
        ValueError: naming file, rule, value and remedy.
    """

    _MAX_SPACING_RATIO = 3.0  # ours: coarser data hold none of what the model draws
    _FEWEST_VOXELS = 2  # along an axis, as interpolation needs
    _HU_LIMITS = (-4000.0, 40000.0)  # ours: beyond any padding value and any metal

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
        if spacing_mm is not None:
            check_lengths(spacing_mm)
            spacing_mm = spacing_mm if len(spacing_mm) == 3 else [max(spacing_mm)] * 3
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
            check_grid(data[first], data[second])
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
        if self.spacing_mm is not None and isinstance(volume, MetaTensor):
            self._check_spacing(volume, self.spacing_mm)

    def _check_spacing(self, volume: MetaTensor, spacing_mm: Sequence[float]) -> None:
        order = io_orientation(volume.affine.numpy())[:, 0].astype(int)  # the file's axes may come in any order
        spacing = np.asarray(spacing_mm, dtype=float)[order]
        pixdim = volume.pixdim.numpy()
        given = f"spacing {[float(f'{p:g}') for p in pixdim]} mm"
        ratio, voxels = (pixdim / spacing).max(), pixdim * volume.shape[1:] / spacing
        if ratio > self._MAX_SPACING_RATIO:
            raise ValueError(
                f"{file_of(volume)}: {given} is {ratio:.1f} times the model's {spacing.tolist()} mm; "
                f"at most {self._MAX_SPACING_RATIO:g} times is possible, use finer data"
            )
        if voxels.min() < self._FEWEST_VOXELS:
            raise ValueError(
                f"{file_of(volume)}: {tuple(volume.shape[1:])} voxels of {given} are fewer than {self._FEWEST_VOXELS} "
                f"of the model's {spacing.tolist()} mm along an axis; "
                "correct the spacing in the header (mm), or use a larger field of view"
            )

    def _check_image(self, image: Any) -> None:
        low, high = float(image.min()), float(image.max())
        if low == high:
            raise ValueError(
                f"{file_of(image)}: every voxel is {low:g}; a constant image cannot be used, export the scan anew"
            )
        if low > self.air_below_hu or low < self._HU_LIMITS[0] or high > self._HU_LIMITS[1]:
            raise ValueError(
                f"{file_of(image)}: values {low:g} to {high:g} are not Hounsfield units: the minimum must lie between "
                f"{self._HU_LIMITS[0]:g} and {self.air_below_hu:g} and the maximum below {self._HU_LIMITS[1]:g}; "
                "apply the rescale slope and intercept, and do not window or normalise"
            )

    def _check_label(self, label: Any) -> None:
        values = torch.as_tensor(label).as_subclass(torch.Tensor)
        if not bool((values == values.round()).all()):
            parts = values[values != values.round()].unique()[:5].tolist()
            raise ValueError(f"{file_of(label)}: label ids must be integers, got {parts}")
        if values.min() < 0 or values.max() >= self.num_labels:
            unknown = [int(i) for i in values.unique().tolist() if not 0 <= i < self.num_labels]
            raise ValueError(
                f"{file_of(label)}: label ids {unknown} are not in the label map 0 to {self.num_labels - 1}; "
                "map or drop them with `label_mapping` in the config"
            )
        if not bool(values.any()):
            raise ValueError(f"{file_of(label)}: the mask is empty; every case needs at least one label")


class LoadConfidenced(Transform):
    """Read `confidence` of a case on the grid of its `label`; a case without one is trusted everywhere.

    Raises:
        ValueError: naming the file, when it is on another grid, not between 0 and 1, or has several channels.
    """

    def __init__(self) -> None:
        self.load = Compose([LoadVolumesd("confidence"), EnsureChannelFirstd("confidence")])

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Add `confidence` (1, H, W, D) to an item whose label is (1, H, W, D)."""
        item = dict(data)
        if "confidence" not in item:
            item["confidence"] = torch.ones_like(item["label"], dtype=torch.float32)
            return item
        item = self.load(item)
        low, high = float(item["confidence"].min()), float(item["confidence"].max())
        if not (low >= 0 and high <= 1):  # also refuses NaN
            raise ValueError(
                f"{file_of(item['confidence'])}: confidence must lie between 0 and 1, got {low:g} to {high:g}"
            )
        if len(item["confidence"]) != 1:
            raise ValueError(
                f"{file_of(item['confidence'])}: confidence must be one volume, got {len(item['confidence'])} channels"
            )
        check_grid(item["label"], item["confidence"])
        return item


def read_labels(item: Mapping[str, Any], label_mapping: Mapping[str, Sequence[int]]) -> MetaTensor:
    """The `label` of a case, (1, H, W, D), in the ids of the model; these are not checked.

    Args:
        item: with `label`, and `mapped_label` where its list says whether the ids are those of the model.
        label_mapping: "from" and "to" ids; others stay.
    """
    key, read = "label", Compose([LoadVolumesd("label"), EnsureChannelFirstd("label")])
    mapped = {mapped_key(key): is_mapped(item[key], item.get(mapped_key(key)))}
    volume: MetaTensor = MapLabelsd(key, label_mapping)(read({key: item[key]}) | mapped)[key]
    return volume


def reading_chain(
    *,
    pairs: Sequence[Sequence[str]] = (),
    labels: Sequence[str] = (),
    images: Sequence[str] = (),
    num_labels: int,
    label_mapping: Mapping[str, Sequence[int]],
    spacing_mm: Sequence[float] | None,
    confidence: bool = False,
    resampled: Sequence[str] | None = None,
    thin_labels: Sequence[int] = (),
) -> list[Transform]:
    """The chain from files to volumes of the model: read, labels renumbered, checked, brought to RAS and one spacing.

    Args:
        pairs: (image, label) keys that share one grid.
        labels: further label maps.
        images: images without a label map.
        num_labels: label ids 0 to num_labels - 1.
        label_mapping: "from" and "to" ids; others stay. Label maps whose item says that they are mapped are left.
        spacing_mm: of the model, along the axes of RAS, or its finest and coarsest: then all volumes come to the
            largest voxel edge of the first of `labels`, else of the label of the first pair, else of the first image,
            within these. None keeps each volume's own.
        confidence: also read `confidence`, which lies on the grid of `label`.
        resampled: keys that are brought to RAS and spacing; None takes all. Others stay as they were read.
        thin_labels: ids of vessels, which stay connected on the new grid.

    Returns:
        transforms in their order, for a `Compose`; a list, so that a `CacheDataset` sees which are random.

    Raises:
        ValueError: on a mapping that cannot be meant, see :func:`custom.volumes.numbering.check_mapping`, or another
            form of `spacing_mm`.
    """
    masks = [*labels, *(label for _, label in pairs)]
    keys = [*images, *labels, *(key for pair in pairs for key in pair)]
    check_mapping(label_mapping, num_labels)
    chain: list[Transform] = [LoadVolumesd(keys), EnsureChannelFirstd(keys), EnsureTyped(keys, dtype=torch.float32)]
    if masks:
        chain.append(MapLabelsd(masks, label_mapping))
    chain.append(CheckVolumesd(keys, label_keys=masks, num_labels=num_labels, spacing_mm=spacing_mm, grids=pairs))
    if confidence:
        chain.append(LoadConfidenced())
    moved = [*keys, *["confidence"] * confidence] if resampled is None else list(resampled)
    chain.append(Orientationd(moved, axcodes="RAS", labels=None))
    if spacing_mm is not None:
        chain.append(
            ToSpacingd(
                moved,
                label_keys=masks,
                spacing_mm=spacing_mm,
                follow=[*masks, *images][0],
                thin_labels=thin_labels,
                linear_keys=["confidence"],
            )
        )
    return chain

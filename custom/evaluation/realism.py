"""How far rendered images can be told from scans: at edges, by their spectrum, and by a network that is asked to. Ours.

Each compares a set with real cases; what real cases differ from each other by is the floor.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from custom.geometry.topology import bounding_box
from custom.volumes.grain import power_spectrum
from custom.volumes.haar import haar_pack
from custom.volumes.intensity import interior
from monai.metrics import compute_roc_auc
from monai.transforms import RandCropByLabelClasses
from numpy.typing import NDArray
from scipy import ndimage
from torch import nn

__all__ = ["BANDS", "draw_patches", "edge_speckle", "interior_spectrum", "spectrum_ratio", "two_sample_auc"]

BANDS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)
"""Limits of the radial bands, cycles a voxel."""
PATCH = 24
"""Voxels a side of what the network sees, ours: 36 mm at 1.5 mm, a chamber wall with what lies on both sides."""
_IMAGE_UNIT_HU, _DETAIL_UNIT_HU = 500.0, 20.0  # ours: contrast of blood, and grain
_FOLDS = 2


def edge_speckle(image: NDArray, label: NDArray) -> float:
    """Root mean square in HU of the image minus its 3^3 median where labels meet; NaN where none do.

    Args:
        image: (H, W, D) HU.
        label: (H, W, D) ids.
    """
    if not label.any():
        return float("nan")
    box = tuple(slice(max(side.start - 2, 0), side.stop + 2) for side in bounding_box(label != 0))
    ids, values = label[box], np.asarray(image[box], dtype=np.float32)
    edge = ndimage.maximum_filter(ids, 3) != ndimage.minimum_filter(ids, 3)
    if not edge.any():
        return float("nan")
    cubes = np.lib.stride_tricks.sliding_window_view(np.pad(values, 1, mode="symmetric"), (3, 3, 3))
    rest = values[edge] - np.median(cubes[edge].reshape(-1, 27), axis=1)
    return float(np.sqrt(np.square(rest).mean()))


def interior_spectrum(image: NDArray, label: NDArray, labels: Sequence[int]) -> NDArray[np.float64]:
    """Radial power spectrum inside labels, away from their edges; each label's mean is taken off.

    Args:
        image: (H, W, D) HU.
        label: (H, W, D) ids.
        labels: ids of homogeneous structures.

    Returns:
        (5,) HU^2, mean power in the bands between BANDS; NaN without such a label.
    """
    core = interior(label)
    inside = np.isin(core, [k for k in labels if k])
    values = np.zeros(image.shape)
    for k in np.unique(core[inside]):
        values[core == k] = image[core == k] - image[core == k].mean()
    if not inside.any():
        return np.full(len(BANDS) - 1, np.nan)
    power = power_spectrum(values, inside)
    axes = [np.fft.fftfreq(n) for n in power.shape[:2]] + [np.fft.rfftfreq(power.shape[0])]
    radius = np.sqrt(sum(np.square(axis) for axis in np.ix_(*axes)))
    band = np.digitize(radius, BANDS[1:-1])
    return np.array([power[(band == k) & (radius <= BANDS[-1])].mean() for k in range(len(BANDS) - 1)])


def spectrum_ratio(rendered: NDArray, real: NDArray) -> list[float]:
    """Mean spectrum of rendered cases (N, bands) over that of real ones (M, bands), by band."""
    return (np.nanmean(rendered, 0) / np.nanmean(real, 0)).tolist()


def draw_patches(image: NDArray, label: NDArray, *, count: int, num_labels: int, seed: int) -> torch.Tensor:
    """Patches around labels, each label as likely, of image and mask.

    Args:
        image: (H, W, D) HU, padded where it is smaller than a patch.
        label: (H, W, D) ids.
        count: of patches.
        num_labels: label ids 0 to num_labels - 1.
        seed: of the places.

    Returns:
        (count, 2, 24, 24, 24) float16, image in units of 500 HU and label over the highest id.
    """
    both = torch.stack([torch.as_tensor(np.ascontiguousarray(v)).float() for v in (image, label)])
    both[0] /= _IMAGE_UNIT_HU
    both[1] /= num_labels - 1
    missing = [max(PATCH - n, 0) for n in both.shape[1:]]
    both = torch.nn.functional.pad(both[None], [p for m in reversed(missing) for p in (0, m)], mode="replicate")[0]
    ratios = [0.0] + [1.0] * (num_labels - 1)
    crop = RandCropByLabelClasses([PATCH] * 3, ratios=ratios, num_classes=num_labels, num_samples=count, warn=False)
    crop.set_random_state(seed)
    ids = (both[1:] * (num_labels - 1)).round()
    return torch.stack([torch.as_tensor(p).as_subclass(torch.Tensor) for p in crop(both, label=ids)]).half()


def _bands(patches: torch.Tensor) -> torch.Tensor:
    """What the network reads of patches (B, 2, H, W, D): (B, 16, H/2, W/2, D/2), Haar bands of image and mask. Ours.

    Details of the image are compressed in units of grain. A residual network that reads HU sees contrast, which differs
    between scans anyway: on phantoms, in the 12 CPU seconds that 300 steps of this one take, it told images without any
    grain by an AUC of 0.50, and this one by 1.00 (docs/MEASURES.md has more).
    """
    image, mask = haar_pack(patches.float()).split(8, 1)
    detail = torch.asinh(image[:, 1:] * (_IMAGE_UNIT_HU / _DETAIL_UNIT_HU))
    return torch.cat([image[:, :1] / 8**0.5, detail, mask], 1)


def _network() -> nn.Sequential:
    """Bands -> (B, 1) logit: what two convolutions find, wherever it is in the patch."""
    layers: list[nn.Module] = []
    for before, after, stride in ((16, 32, 2), (32, 48, 1)):
        layers += [nn.Conv3d(before, after, 3, stride, 1, bias=False), nn.BatchNorm3d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(48, 1))


def _auc_of_fold(patches: torch.Tensor, made: torch.Tensor, trained: torch.Tensor, *, steps: int, seed: int) -> float:
    """AUC on the patches that are not trained on."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = _network()
        optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)
        loss = nn.BCEWithLogitsLoss()
        groups = [torch.nonzero(trained & (made == value))[:, 0] for value in (False, True)]
        network.train()
        for _ in range(steps):
            chosen = torch.cat([g[torch.randint(len(g), (16,))] for g in groups])
            optimizer.zero_grad()
            loss(network(_bands(patches[chosen]))[:, 0], made[chosen].float()).backward()
            optimizer.step()
        network.eval()
        with torch.no_grad():
            scores = torch.cat([network(_bands(part))[:, 0] for part in patches[~trained].split(64)])
    return float(np.asarray(compute_roc_auc(scores, made[~trained].float())))


def two_sample_auc(
    made: Sequence[torch.Tensor], real: Sequence[torch.Tensor], *, steps: int = 300, repeats: int = 1, seed: int = 0
) -> dict[str, float]:
    """Classifier two-sample test (Lopez-Paz & Oquab 2017): can a small 3D network tell rendered from real patches?

    Trained on half of the cases of both sets, asked about the other half, and the reverse.

    Args:
        made, real: of each case, patches of :func:`draw_patches`; two cases or more.
        steps: of training, 32 patches each.
        repeats: halvings.
        seed: of halves and weights.

    Returns:
        "mean" and "sd" over halves of the area under the ROC curve: 0.5 cannot be told apart, 1 always.

    Raises:
        ValueError: with fewer than two cases in a set.
    """
    if min(len(made), len(real)) < 2:
        raise ValueError(f"two cases of each set are needed to tell them apart, got {len(made)} and {len(real)}")
    patches = torch.cat([*made, *real])
    counts = torch.tensor([len(p) for p in [*made, *real]])
    is_made = torch.arange(len(counts)).lt(len(made)).repeat_interleave(counts)
    values, rng = [], np.random.default_rng(seed)
    for repeat in range(repeats):
        half = np.concatenate([rng.permutation(n) % _FOLDS for n in (len(made), len(real))])
        for fold in range(_FOLDS):
            trained = torch.from_numpy(half != fold).repeat_interleave(counts)
            values.append(_auc_of_fold(patches, is_made, trained, steps=steps, seed=seed + repeat))
    return {"mean": float(np.mean(values)), "sd": float(np.std(values))}

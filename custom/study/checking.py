"""Cases looked at before anything is made of them: what they are, what will be refused, and what to do about it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
import torch
from custom.masks.preparation import prepare_label_map
from custom.runs.files import file_hash, write_json
from custom.study.cases import SECTIONS, cases_in, is_folder, listed_cases
from custom.volumes.anatomy import Anatomy
from custom.volumes.reading import CheckVolumesd, reading_chain
from monai.transforms import Transform
from torch.nn import functional as F

logger = logging.getLogger(__name__)

_LIMITS_MM = (0.8, 1.5)  # of the generator
_MASK_MM = [0.8, 0.8, 0.8]  # of the masks of a study
_MARGIN_VOXELS = 4
_WINDOW_HU, _THUMBNAIL = (-200.0, 800.0), 16
_ALIKE = 0.97  # ours: correlation of two hearts, 16 voxels wide; of two phantoms it is below 0.9
_CONTRAST_HU = 200.0  # of blood with contrast agent; as in training
_COLUMNS = ("voxels", "mm", "field_mm", "axes", "hu", "contrast", "labels", "pieces")
_WASHED_OUT = 0.6  # ours, of the left ventricle's mean


@dataclass
class Checked:
    """What is known of a case.

    Attributes:
        case, section: as listed.
        row: of the table.
        refused: why a stage would refuse it, each with the remedy.
        notes: what would go through, but should be looked at.
        means_hu: name of label -> mean.
        thumbnail: standardised, of the heart; None where it could not be read.
    """

    case: str
    section: str
    row: dict[str, Any] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    means_hu: dict[str, float] = field(default_factory=dict)
    thumbnail: np.ndarray | None = None
    hashes: dict[str, str] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """One word."""
        return "refused" if self.refused else "look" if self.notes else "ok"


def _read(case: Mapping[str, Any], labels: Anatomy, mapping: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """Image and label of a case as every stage reads and checks them, on their own grid."""
    chain = reading_chain(
        pairs=[["image", "label"]], num_labels=labels.num_labels, label_mapping=mapping, spacing_mm=_LIMITS_MM
    )
    until = next(k for k, step in enumerate(chain) if isinstance(step, CheckVolumesd))
    return _through(chain[: until + 1], case)


def _through(chain: Sequence[Transform], case: Mapping[str, Any]) -> dict[str, Any]:
    """A case through transforms one by one: MONAI's `Compose` would put its own error before theirs."""
    item: Any = {key: value for key, value in case.items() if key in ("image", "label", "mapped_label")}
    for step in chain:
        item = step(item)
    return item


def _look(found: Checked, item: Mapping[str, Any], labels: Anatomy) -> None:
    """Fill the row of a case that can be read, and note what is unusual."""
    image, label = (np.asarray(item[key])[0] for key in ("image", "label"))
    ids, affine = label.round().astype(np.int64), item["label"].affine.numpy()
    counts = np.bincount(ids.ravel(), minlength=labels.num_labels)
    sums = np.bincount(ids.ravel(), weights=image.ravel(), minlength=labels.num_labels)
    spacing = [float(f"{s:.3g}") for s in item["label"].pixdim.tolist()]
    present = [k for k in labels.foreground if counts[k]]
    means = {k: float(sums[k] / counts[k]) for k in present}
    found.means_hu = {labels.names[k]: round(mean, 1) for k, mean in means.items()}
    found.row |= {
        "voxels": " x ".join(map(str, ids.shape)),
        "mm": " x ".join(f"{s:g}" for s in spacing),
        "field_mm": " x ".join(f"{n * s:.0f}" for n, s in zip(ids.shape, spacing, strict=True)),
        "axes": "".join(nib.aff2axcodes(affine)),
        "hu": f"{image.min():.0f} to {image.max():.0f}",
        "contrast": _phase(found, labels, means),
        "labels": f"{len(present)} of {len(labels.foreground)}",
    }
    if absent := [f"{k} ({labels.names[k]})" for k in labels.foreground if k not in present]:
        found.notes.append(f"has no label {', '.join(absent)}: taught as background; leave it, or complete the map")
    outside = [k for k, (low, high) in labels.plausible_hu.items() if k in means and not low <= means[k] <= high]
    for k in outside:
        low, high = labels.plausible_hu[k]
        found.refused.append(
            f"label {k} ({labels.names[k]}) has a mean of {means[k]:.0f} HU, {low:g} to {high:g} are plausible, so the "
            "gate would reject all that looks like it: if ids are numbered otherwise, renumber them "
            f"(`label_mapping` in a file named by --overrides), else widen `anatomy#{k}#plausible_hu` there"
        )
    edges = set(np.concatenate([np.unique(np.take(ids, at, axis)) for axis in range(3) for at in (0, -1)]).tolist())
    if cut := [labels.names[k] for k in present if k in edges and (labels.labels[k].wall or labels.labels[k].thin)]:
        found.notes.append(
            f"{', '.join(cut)}: cut off by the edge of the field of view; take a scan of the whole heart"
        )
    found.thumbnail = _thumbnail(image, ids)


def _phase(found: Checked, labels: Anatomy, means: Mapping[int, float]) -> str:
    """Which sides are filled with contrast agent, where the label map has both ventricles."""
    sides = [k for name in ("left ventricle", "right ventricle") for k in means if labels.names[k] == name]
    if len(sides) < 2:
        return "?"
    left, right = (means[k] for k in sides)
    if left < _CONTRAST_HU:
        found.notes.append(
            f"the left ventricle has {left:.0f} HU: coronaries can hardly be told; take a scan of the arterial phase"
        )
        return f"little ({left:.0f}, {right:.0f})"
    return f"{'left' if right < _WASHED_OUT * left else 'both sides'} ({left:.0f}, {right:.0f})"


def _thumbnail(image: np.ndarray, ids: np.ndarray) -> np.ndarray:
    where = np.argwhere(ids > 0)
    box = tuple(slice(low, high + 1) for low, high in zip(where.min(0), where.max(0), strict=True))
    view = torch.from_numpy(np.ascontiguousarray(image[box])).float().clamp(*_WINDOW_HU)[None, None]
    small = F.adaptive_avg_pool3d(view, _THUMBNAIL).numpy().ravel().astype(np.float64)
    small -= small.mean()
    return small / max(float(np.linalg.norm(small)), 1e-9)


def _prepare(found: Checked, case: Mapping[str, Any], labels: Anatomy, mapping: Mapping[str, Sequence[int]]) -> None:
    """Bring the label map to its intended topology, as `generating` does with a reference."""
    chain = reading_chain(
        labels=["label"],
        num_labels=labels.num_labels,
        label_mapping=mapping,
        spacing_mm=_MASK_MM,
        thin_labels=labels.thin,
    )
    item = _through(chain, {key: value for key, value in case.items() if key != "image"})
    ids = np.asarray(item["label"])[0].round().astype(np.uint8)
    where = np.argwhere(ids > 0)
    low, high = where.min(0) - _MARGIN_VOXELS, where.max(0) + _MARGIN_VOXELS + 1
    box = tuple(slice(max(a, 0), b) for a, b in zip(low.tolist(), high.tolist(), strict=True))
    spacing = item["label"].pixdim.tolist()
    _, report = prepare_label_map(ids[box], labels.structures, spacing_mm=spacing)
    before, after = (sum(part[key][0] for part in report.values()) for key in ("betti_before", "betti_after"))
    found.row["pieces"] = f"{before}" if before == after else f"{before} -> {after}"
    for k, part in report.items():
        if part["dice"] < 0.9:
            found.notes.append(
                f"label {k} ({part['name']}) loses or gains much when brought to its intended topology (Dice "
                f"{part['dice']:.2f}, pieces, handles, cavities {part['betti_before']} -> {part['betti_after']}): look "
                "at it"
            )


def check_case(
    case: Mapping[str, Any], labels: Anatomy, mapping: Mapping[str, Sequence[int]], *, reference: bool
) -> Checked:
    """Look at one case.

    Args:
        case: with `image`, `label`, `case` and `section`.
        labels, mapping: that it will be read by.
        reference: whether new masks would be made from it, so that its topology must be as intended.
    """
    found = Checked(str(case["case"]), str(case["section"]))
    missing = [str(case[key]) for key in ("image", "label") if not Path(case[key]).is_file()]
    found.refused += [f"{file}: there is no such file; correct its name, or put it there" for file in missing]
    if missing:
        return found
    found.hashes = {key: file_hash(str(case[key])) for key in ("image", "label")}
    try:
        item = _read(case, labels, mapping)
    except (ValueError, TypeError, OSError) as error:
        found.refused.append(str(error))
        return found
    _look(found, item, labels)
    if reference:
        try:
            _prepare(found, case, labels, mapping)
        except ValueError as error:
            found.refused.append(f"{case['label']}: {error}")
    return found


def compare_cases(cases: Sequence[Checked]) -> None:
    """Refuse the same image in two cases; note hearts that are nearly alike, which would be learned and tested on."""
    for first, second in combinations(cases, 2):
        pair = f"{first.case} and {second.case}"
        same = [key for key, value in first.hashes.items() if second.hashes.get(key) == value]
        alike = 0.0
        if first.thumbnail is not None and second.thumbnail is not None:
            alike = float(first.thumbnail @ second.thumbnail)
        if "image" in same:
            second.refused.append(f"{pair}: the same image; list it once")
        elif same or alike > _ALIKE:
            seen = "the same label map" if same else f"nearly the same heart (correlation {alike:.2f})"
            second.notes.append(f"{pair}: {seen}; if it is one patient, keep both in one section")


def check_cases(
    datalist: str, labels: Anatomy, mapping: Mapping[str, Sequence[int]], out: str | None = None
) -> list[Checked]:
    """Look at all cases, log a table and what is amiss.

    Args:
        datalist: JSON with "training", "validation" and "test", or a folder with `images` and `labels`.
        labels, mapping: that they will be read by.
        out: JSON file to write as well.

    Raises:
        FileNotFoundError, ValueError: when there is no list that can be read, naming it.
    """
    cases = cases_in(datalist) if is_folder(datalist) else listed_cases(datalist)
    checked = []
    for number, case in enumerate(cases, start=1):
        logger.info("case %d of %d: %s", number, len(cases), case["case"])
        checked.append(check_case(case, labels, mapping, reference=case["section"] in ("", SECTIONS[0])))
    compare_cases(checked)
    rows = [
        {"section": c.section, "case": c.case, **{k: c.row.get(k, "") for k in _COLUMNS}, "verdict": c.verdict}
        for c in checked
    ]
    logger.info("\n%s", pd.DataFrame(rows).to_string(index=False))
    for c in checked:
        for kind, lines in (("REFUSED", c.refused), ("look", c.notes)):
            for line in lines:
                logger.info("%-8s%s%s: %s", kind, f"{c.section} " * bool(c.section), c.case, line)
    refused = sum(bool(c.refused) for c in checked)
    logger.info("%d of %d cases will be refused", refused, len(checked))
    if out is not None:
        write_json(
            Path(out),
            {
                "cases": [
                    {**row, "refused": c.refused, "notes": c.notes, "means_hu": c.means_hu}
                    for row, c in zip(rows, checked, strict=True)
                ]
            },
        )
    return checked

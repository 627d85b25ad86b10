"""Label ids of files brought to those of the model, once: what a stage has written has them already."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

from monai.config import KeysCollection
from monai.transforms import MapLabelValue, MapTransform

__all__ = ["MapLabelsd", "check_mapping", "is_mapped", "mapped_key"]

RUN_RECORDS = ("generation.json", "synthesis.json")
"""Files that say what a folder of masks or of a synthetic set is: what lies below has the ids of the model."""
_DEPTH = 3  # folders from a label to its run: `rejected/labels/`


def mapped_key(key: str) -> str:
    """Entry of an item that says whether the label map under `key` has the ids of the model. No label_ in front."""
    return f"mapped_{key}"


def is_mapped(label: str, stated: bool | None = None) -> bool:
    """Whether a label map has the ids of the model already.

    Args:
        label: its file.
        stated: what its list says; None asks whether it lies in the folder of a run of ours.
    """
    if stated is not None:
        return stated
    folders = Path(label).resolve().parents[1:_DEPTH]
    return any((folder / name).is_file() for folder in folders for name in RUN_RECORDS)


def check_mapping(label_mapping: Mapping[str, Sequence[int]], num_labels: int) -> None:
    """Refuse a mapping that cannot be what is meant.

    Args:
        label_mapping: "from" and "to" ids, all at once: a new id may be an old id of another rule.
        num_labels: label ids 0 to num_labels - 1.

    Raises:
        ValueError: on lists of different length, an old id with two new ones, or a new id that does not exist.
    """
    old, new = label_mapping["from"], label_mapping["to"]
    if len(old) != len(new) or len(set(old)) != len(old):
        raise ValueError(
            f"label_mapping: 'from' must name as many ids as 'to', and none twice, got {list(old)} and {list(new)}; "
            "write the new id of each below it"
        )
    unknown = [k for k in new if not 0 <= k < num_labels]
    if unknown:
        raise ValueError(
            f"label_mapping: new ids must be in the label map 0 to {num_labels - 1}, got {unknown}; 0 drops a label"
        )


class MapLabelsd(MapTransform):
    """Renumber label maps that are not yet in the ids of the model; takes the entries of `mapped_key` out of the item.

    All rules of a mapping hold for the ids of the file, so that a swap is one.

    Args:
        keys: label maps.
        label_mapping: "from" and "to" ids; others stay.
    """

    def __init__(self, keys: KeysCollection, label_mapping: Mapping[str, Sequence[int]]) -> None:
        super().__init__(keys)
        old, new = label_mapping["from"], label_mapping["to"]
        self.map = MapLabelValue(old, new) if old else None  # MONAI refuses an empty one

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Renumber one item."""
        item = dict(data)
        for key in self.key_iterator(item):
            if not item.pop(mapped_key(str(key)), False) and self.map is not None:
                item[key] = self.map(item[key])
        return item

"""Cases of a synthetic data set written and listed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

from custom.runs.files import file_hash, write_json
from custom.runs.folders import RunFolder
from custom.synthesis.cases import record_of
from custom.synthesis.judging import template_of
from custom.volumes.numbering import mapped_key
from custom.volumes.reading import read_labels
from custom.volumes.writing import write_volume
from ignite.engine import Engine
from monai.transforms import Transform

logger = logging.getLogger(__name__)

ACCEPTED, REJECTED = "", "rejected/"


class SaveSyntheticd(Transform):
    """Write image, confidence, label and last the record of a case; what the gate rejected goes to `rejected/`.

    Args:
        output_dir: of the run.
        cases: all of the run, as `synthesis_cases` gives them; records keep where an image came from.
        label_mapping: "from" and "to" ids, applied to a mask of the user as it was to what the network saw.
    """

    def __init__(
        self, *, output_dir: str, cases: Sequence[Mapping[str, Any]], label_mapping: Mapping[str, Sequence[int]]
    ) -> None:
        self.root, self.label_mapping = Path(output_dir), label_mapping
        self.sources = {case["case"]: dict(case) for case in cases}

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Write one item.

        Raises:
            OSError: naming the file that could not be written.
        """
        case, place = data["case"], REJECTED if data["rejected"] else ACCEPTED
        files = {"image": f"{place}images/{case}.nii.gz", "confidence": f"{place}confidence/{case}.nii.gz"}
        files["label"] = f"{place}labels/{case}.nii.gz"
        write_volume(self.root / files["image"], data["pred"], dtype="int16")
        write_volume(self.root / files["confidence"], data["confidence"], dtype="float32", digits=2)
        source = self.sources[case]
        write_volume(self.root / files["label"], read_labels(source, self.label_mapping), dtype="uint8")
        content = {
            "case": case,
            "rejected": data["rejected"],
            "score_hu": data["score"],
            "measures": data["measures"],
            "mask": source["label"],
            "mask_hash": file_hash(source["label"]),
            "template": template_of(source),
            "paths": files,
            "files": {file: file_hash(str(self.root / file)) for file in files.values()},
        }
        write_json(self.root / "records" / f"{case}.json", content)
        return dict(data)


def write_synthetic_datalist(
    cases: Sequence[Mapping[str, Any]], output_dir: str, provenance: Mapping[str, Any]
) -> dict[str, int]:
    """Write `datalist.json` of the complete cases: "training" what the gate accepted, "rejected" the rest with reasons.

    Several processes write it one after the other, each when it is done, and again while cases are added meanwhile.

    Returns:
        how many are in each list, and how many are "missing".
    """
    root = Path(output_dir)
    seen: set[tuple[Path, int]] | None = None
    while seen != (found := {(path, path.stat().st_mtime_ns) for path in (root / "records").glob("*.json")}):
        seen = found
        records = [record for case in cases if (record := record_of(output_dir, case))]
        lists: dict[str, list[dict[str, Any]]] = {"training": [], "rejected": []}
        for record in sorted(records, key=lambda record: record["case"]):
            item = {**record["paths"], "score_hu": record["score_hu"], "record": f"records/{record['case']}.json"}
            item[mapped_key("label")] = True
            if record["rejected"]:
                lists["rejected"].append(item | {"reasons": record["rejected"]})
            else:
                lists["training"].append(item)
        write_json(root / "datalist.json", {**lists, "provenance": dict(provenance)})
    counts = {name: len(items) for name, items in lists.items()} | {"missing": len(cases) - len(records)}
    logger.info("%(training)d synthetic cases, %(rejected)d rejected, %(missing)d missing", counts)
    return counts


def make_synthetic_set(
    folder: RunFolder, evaluator: Engine, *, cases: Sequence[Mapping[str, Any]], report: Callable[[], Any]
) -> dict[str, int]:
    """Render what is missing of a set, list what there is, and report it.

    Args:
        folder: of the run.
        evaluator: renders, judges and writes the cases that are missing.
        cases: all of the run.
        report: called by the first process at the end.

    Returns:
        as :func:`write_synthetic_datalist`.
    """
    with folder as provenance:
        evaluator.run()
        counts = write_synthetic_datalist(cases, folder.output_dir, provenance)
        if folder.shard == 0:
            report()
    return counts

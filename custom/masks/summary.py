"""What a run of the mask generation module leaves beside the masks: datalist, table, pictures, MLflow run."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from custom.masks.cases import IMAGES, MASKS, PREPARED, RECORDS
from custom.runs.files import read_json, write_json, write_table
from custom.runs.tracking import log_run
from custom.volumes.names import case_name
from custom.volumes.numbering import mapped_key
from custom.volumes.pictures import read_ras, save_mask_sheet

logger = logging.getLogger(__name__)

__all__ = ["summarise_masks"]


def _row(record: Mapping[str, Any]) -> dict[str, Any]:
    """One line of the table."""
    if not record["accepted"]:
        return {"case": record["case"], "accepted": False, "reason": record["reason"]}
    row = {k: record[k] for k in ("case", "accepted", "source", "retries", "scale", "min_det_jacobian")}
    row["highest_dice"] = max(record["dice_to_references"])
    row |= {f"volume_ml_{k}": round(v, 3) for k, v in record["volume_ml"].items()}
    row |= {f"betti_{k}": " ".join(map(str, v)) for k, v in record["betti"].items()}
    row |= {f"wall_mm_{k}": round(v, 2) for k, v in record["wall_thickness_mm"].items()}
    row |= {f"vessel_mm_{k}": round(v["length_mm"], 1) for k, v in record["vessels"].items()}
    return row


def _write_pictures(root: Path, records: Sequence[Mapping[str, Any]], vessel_labels: Sequence[int]) -> Path:
    files = [(f"reference {case_name(path.name)}", path) for path in sorted((root / PREPARED).glob("*.nii.gz"))[:2]]
    files += [(r["case"], root / MASKS / f"{r['case']}.nii.gz") for r in records[:6]]
    path = root / "pictures" / "masks.png"
    save_mask_sheet(path, [(title, read_ras(file).round()) for title, file in files], vessel_labels=vessel_labels)
    return path


def summarise_masks(
    *, output_dir: str, provenance: Mapping[str, Any], vessel_labels: Sequence[int], tracking_uri: str
) -> dict[str, float]:
    """Write `summary.csv`, `pictures/masks.png`, an MLflow run and, last, `datalist.json` from all records of a run.

    Args:
        output_dir: of the run.
        provenance: what `claim_folder` returned; becomes part of the datalist. "with_image" tells whether there are.
        vessel_labels: ids of the projection in the pictures.
        tracking_uri: of MLflow.

    Returns:
        measures of the run: "requested", "accepted", "accepted_at_once", "mean_retries".

    Raises:
        RuntimeError: when masks were not accepted, naming them and the reason of the first; the others are written.
    """
    root = Path(output_dir)
    records = [read_json(path, "delete it") for path in sorted((root / RECORDS).glob("*.json"))]
    accepted = [record for record in records if record["accepted"]]
    write_table(root / "summary.csv", [_row(record) for record in records])
    retries = [record["retries"] for record in accepted]
    measures = {
        "requested": float(len(records)),
        "accepted": float(len(accepted)),
        "accepted_at_once": float(retries.count(0)),
        "mean_retries": float(np.mean(retries)) if retries else float("nan"),
    }
    log_run(
        tracking_uri,
        root,
        run_name="generate_masks",
        params={"seed": provenance["seed"], "config_hash": provenance["config_hash"]},
        metrics=measures,
        artifacts=[_write_pictures(root, accepted, vessel_labels)] if accepted else [],
    )
    items = [
        {"label": f"{MASKS}/{r['case']}.nii.gz", "source": r["source"], "record": f"{RECORDS}/{r['case']}.json"}
        | {mapped_key("label"): True}
        | ({"image": f"{IMAGES}/{r['case']}.nii.gz"} if provenance["with_image"] else {})
        for r in accepted
    ]
    write_json(root / "datalist.json", {"training": items, "provenance": dict(provenance)})
    logger.info("%d of %d masks accepted, %d at once: %s", len(accepted), len(records), retries.count(0), root)
    if len(accepted) < len(records):
        failed = [record for record in records if not record["accepted"]]
        raise RuntimeError(
            f"{len(failed)} of {len(records)} masks were not accepted ({', '.join(r['case'] for r in failed)}); the "
            f"others are complete in {root}. {failed[0]['case']}: {failed[0]['reason']}"
        )
    return measures

"""One self-contained HTML page about a synthetic data set."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from custom.evaluation.records import read_set
from custom.evaluation.sets import SET_MEASURES
from custom.runs.files import read_json, replace_file
from custom.runs.tracking import log_run
from custom.synthesis.page.assembling import fitting, render, spread
from custom.synthesis.page.looking import look
from custom.synthesis.page.niivue import find_niivue
from custom.synthesis.page.reasons import in_words
from custom.synthesis.page.segmenters import segmenter_section
from custom.synthesis.page.tables import case_rows, distribution_pictures, set_section
from custom.synthesis.page.viewer import viewer_section
from custom.synthesis.page.volumes import SetVolumes
from custom.volumes.colours import label_colour
from custom.volumes.pictures import WINDOW_HU

logger = logging.getLogger(__name__)

__all__ = ["MAX_BYTES", "write_report"]

MAX_BYTES = 15_000_000  # ours: what mail and browsers still take without complaint
_FOR_CASES, _FOR_OTHERS = 0.3, 0.2  # ours: shares of the page at most; the viewer takes what is left
_ROWS = 500  # ours: of a table; more is read in files
_TRAITS = 60  # ours: so many cases show a distribution, and take a minute or two
_PROVENANCE = 200_000  # signs, ours: of some thousand templates
_VIEWED = 3
_WITHOUT_CASES: dict[str, Any] = {
    "pictures": [],
    "rejected_pictures": {},
    "segmenter_pictures": [],
    "viewer": {"library": "", "data": {}, "version": ""},
    "no_viewer": "",
}

Record = Mapping[str, Any]


class _Labels(NamedTuple):
    """Names for each id, background first, and the ids of vessels."""

    label_names: Sequence[str]
    vessel_labels: Sequence[int]


def _apart(rejected: Sequence[Record], labels: _Labels, gate: Mapping[str, Any]) -> list[tuple[str, list, list]]:
    """Case, what is wrong with it in words, and the limits as the gate names them."""

    def words(record: Record) -> list[str]:
        return [in_words(reason, label_names=labels.label_names, gate=gate) for reason in record["rejected"]]

    return [(record["case"], words(record), record["rejected"]) for record in rejected]


def _text(
    kept: Sequence[Record],
    rejected: Sequence[Record],
    provenance: Mapping[str, Any],
    *,
    labels: _Labels,
    measures: Mapping[str, Any],
    traits: Mapping[str, Sequence[Mapping[str, Any]]],
    evaluations: Mapping[str, str] | None,
) -> dict[str, Any]:
    """What the page says and plots, but for its pictures of cases and its viewer."""
    vessels = [labels.label_names[k] for k in labels.vessel_labels]
    return {
        "kept": len(kept),
        "rejected": len(rejected),
        "labels": [(name, label_colour(k)) for k, name in enumerate(labels.label_names) if k],
        "window": [f"{value:.0f}" for value in WINDOW_HU],
        "cases": case_rows(kept[:_ROWS]),
        "rows": _ROWS,
        "measured": "traits" in measures,
        "distributions": distribution_pictures(traits),
        "of_set": set_section(measures) if measures else None,
        "segmenters": segmenter_section(evaluations, vessels) if evaluations else None,
        "reasons": _apart(rejected[:_ROWS], labels, provenance.get("gate") or {}),
        "provenance": json.dumps(provenance, indent=1)[:_PROVENANCE],
    }


def write_report(
    output_dir: str,
    *,
    label_names: Sequence[str],
    vessel_labels: Sequence[int],
    max_cases: int = 12,
    evaluations: Mapping[str, str] | None = None,
    tracking_uri: str | None = None,
    max_bytes: int = MAX_BYTES,
) -> str:
    """Write `report.html`: pictures, viewer, distributions, what was kept apart, segmenters, tables, provenance.

    Everything is in the one file; it needs no network and no other file.

    Args:
        output_dir: of a finished synthesis, with `datalist.json` and `records/`.
        label_names: one for each id, background first.
        vessel_labels: ids that are projected, and drawn over the others.
        max_cases: so many cases are pictured, from those of the highest to those of the lowest score; and so many
            rejected ones.
        evaluations: name -> output folder of `evaluate.json` of the segmenter; others are compared with the first.
        tracking_uri: of MLflow, where the report is logged; None leaves that out.
        max_bytes: size of the page; pictures and volumes of the viewer are left out or made coarser to keep it.

    Returns:
        path of the page.

    Raises:
        FileNotFoundError, ValueError: of :func:`custom.evaluation.records.read_set`.
    """
    root, labels, niivue = Path(output_dir), _Labels(label_names, vessel_labels), find_niivue()
    kept, rejected, provenance = read_set(output_dir)
    measured = root / SET_MEASURES
    measures = read_json(measured, "run `measuring` again") if measured.exists() else {}
    compared = [] if measures.get("traits") else spread(kept, _TRAITS)
    pictured, pictured_apart = spread(kept, max_cases), rejected[:max_cases]
    viewed = [] if niivue.missing else spread(kept or rejected, _VIEWED)
    seen = look(
        SetVolumes(root, [*kept, *rejected], provenance),
        compared=compared,
        pictured=[*pictured, *pictured_apart],
        viewed=viewed,
        **labels._asdict(),
    )
    own = {
        "synthetic": [seen.traits[record["case"]] for record in compared],
        "templates": [seen.templates[name] for name in sorted(seen.templates)],
    }
    traits = measures.get("traits") or own
    text = _text(kept, rejected, provenance, labels=labels, measures=measures, traits=traits, evaluations=evaluations)
    text["licence"] = niivue.licence
    room = max_bytes - len(render(**text, **_WITHOUT_CASES).encode())

    shown = fitting([seen.pictures[record["case"]] for record in pictured], round(_FOR_CASES * room))
    apart = {record["case"]: seen.pictures[record["case"]] for record in pictured_apart}
    of_segmenters = text["segmenters"]["pictures"] if text["segmenters"] else []
    others = fitting([*apart.values(), *of_segmenters], round(_FOR_OTHERS * room))
    room -= sum(picture.size for picture in [*shown, *others])
    viewer, why = None, niivue.missing
    if not why:
        cases = [seen.viewed[record["case"]] for record in viewed]
        viewer = viewer_section(cases, niivue, **labels._asdict(), room=room)
        why = "" if viewer else f"even one case is too large for a page of {max_bytes / 1e6:.1f} MB"
    page = render(
        **text,
        pictures=shown,
        rejected_pictures={name: picture for name, picture in apart.items() if picture in others},
        segmenter_pictures=[picture for picture in of_segmenters if picture in others],
        viewer=viewer,
        no_viewer=why,
    )
    path = root / "report.html"
    replace_file(path, lambda part: part.write_text(page, encoding="utf-8"))
    if tracking_uri:
        scores = [record["score_hu"] for record in [*kept, *rejected]]
        log_run(
            tracking_uri,
            root,
            run_name="synthesize",
            params={"config_hash": provenance.get("config_hash")},
            metrics={"accepted": len(kept), "rejected": len(rejected), "mean_score_hu": float(np.mean(scores))},
            artifacts=[path],
        )
    logger.info("report of %d cases, %.1f MB: %s", len(kept) + len(rejected), len(page) / 1e6, path)
    return str(path)

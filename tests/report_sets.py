"""A small finished synthesis, and what its report holds."""

from __future__ import annotations

import json
from html.parser import HTMLParser

import nibabel as nib
import numpy as np

NAMES = ["background", "wall", "blood <&>", "vessel"]


REASONS = ["max_score_hu: 9.0, at most 5", "max_label_error_hu: label 2 is +75 HU off its template"]


def make_set(folder, cases=3, rejected=1, name="case"):
    """A finished synthesis of small volumes: a wall with blood inside and a vessel beside it."""
    rng = np.random.default_rng(0)
    lists = {"training": [], "rejected": []}
    for index in range(cases):
        label = np.zeros((24, 26, 22), np.uint8)
        label[4:20, 4:20, 4:18], label[8:16, 8:16, 8:14], label[21:23, 10:12, 3:19] = 1, 2, 3
        hu = np.array([-60, 100, 400, 300])[label] + rng.normal(0, 20, label.shape)
        place, case = ("rejected/" if index < rejected else ""), f"{name}_{index}"
        paths = {key: f"{place}{key}s/{case}.nii.gz" for key in ("image", "label", "confidence")}
        arrays = {"image": hu.astype(np.int16), "label": label, "confidence": rng.random(label.shape, np.float32)}
        for key, path in paths.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(arrays[key], np.diag([-1.0, -1.0, 1.0, 1.0])), folder / path)
        record = {
            "case": case,
            "rejected": REASONS if place else [],
            "score_hu": 3.0 + index,
            "measures": {
                "label_mean_hu": {"1": 100.0},
                "label_error_hu": {"1": -4.0, "2": 12.5},
                "vessel_contrast": 0.91,
                "vessel_continuity": float("nan"),
                "template_copy": 0.2,
            },
            "template": {key: str(folder / "templates" / f"{key}.nii.gz") for key in ("image", "label")},
            "paths": paths,
        }
        (folder / "records").mkdir(exist_ok=True)
        (folder / f"records/{case}.json").write_text(json.dumps(record))
        lists["rejected" if place else "training"].append({"record": f"records/{case}.json"})
    (folder / "templates").mkdir()
    for key in ("image", "label"):
        nib.save(nib.Nifti1Image(arrays[key], np.eye(4)), folder / "templates" / f"{key}.nii.gz")
    provenance = {"seed": 7, "note": "<script>", "gate": {"max_label_error_hu": 60.0}}
    (folder / "datalist.json").write_text(json.dumps({**lists, "provenance": provenance}))


class Page(HTMLParser):
    """Tags that stay open, and what they refer to."""

    def __init__(self, text):
        super().__init__()
        self.open, self.links, self.tags, self.headings = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.headings += [dict(attrs).get("id")] if tag == "h2" else []
        self.links += [value for key, value in attrs if key in ("src", "href", "srcset", "data", "action")]
        if tag not in ("meta", "link", "img", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

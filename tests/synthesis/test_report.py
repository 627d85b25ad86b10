"""The report of a synthetic data set: one page that holds everything it shows."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import nibabel as nib
import numpy as np
import pytest
from custom.synthesis.report import write_report

NAMES = ["background", "wall", "blood <&>", "vessel"]


def make_set(folder, cases=3, rejected=1):
    """A finished synthesis of small volumes: a wall with blood inside and a vessel beside it."""
    rng = np.random.default_rng(0)
    lists = {"training": [], "rejected": []}
    for index in range(cases):
        label = np.zeros((24, 26, 22), np.uint8)
        label[4:20, 4:20, 4:18], label[8:16, 8:16, 8:14], label[21:23, 10:12, 3:19] = 1, 2, 3
        hu = np.array([-60, 100, 400, 300])[label] + rng.normal(0, 20, label.shape)
        place, name = ("rejected/" if index < rejected else ""), f"case_{index}"
        paths = {key: f"{place}{key}s/{name}.nii.gz" for key in ("image", "label", "confidence")}
        arrays = {"image": hu.astype(np.int16), "label": label, "confidence": rng.random(label.shape, np.float32)}
        for key, path in paths.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(arrays[key], np.diag([-1.0, -1.0, 1.0, 1.0])), folder / path)
        record = {
            "case": name,
            "rejected": ["max_score_hu: 9.0, at most 5"] if place else [],
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
        (folder / f"records/{name}.json").write_text(json.dumps(record))
        lists["rejected" if place else "training"].append({"record": f"records/{name}.json"})
    (folder / "templates").mkdir()
    for key in ("image", "label"):
        nib.save(nib.Nifti1Image(arrays[key], np.eye(4)), folder / "templates" / f"{key}.nii.gz")
    (folder / "datalist.json").write_text(json.dumps({**lists, "provenance": {"seed": 7, "note": "<script>"}}))


def report(folder, **changes):
    return write_report(str(folder), label_names=NAMES, vessel_labels=[3], **changes)


class Page(HTMLParser):
    """Tags that stay open, and what they refer to."""

    def __init__(self, text):
        super().__init__()
        self.open, self.links, self.tags = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for key, value in attrs if key in ("src", "href")]
        if tag not in ("meta", "link", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_whole_and_needs_nothing_else(tmp_path):
    make_set(tmp_path)
    text = open(report(tmp_path), encoding="utf-8").read()
    page = Page(text)
    assert page.open == []
    assert all(link.startswith("data:") for link in page.links)
    pictures = re.findall(r"data:image/png;base64,([^\"]+)", text)
    assert len(pictures) == 3 + 2  # every case, scores, intensities
    assert all(base64.b64decode(picture).startswith(b"\x89PNG") for picture in pictures)
    assert "script" not in page.tags  # what stands in provenance and names is text


def test_everything_that_was_recorded_is_shown(tmp_path):
    make_set(tmp_path)
    text = open(report(tmp_path), encoding="utf-8").read()
    assert "2 cases accepted, 1 kept apart" in text
    assert "not for clinical use" in text
    for shown in ("case_0", "case_1", "case_2", "max_score_hu: 9.0, at most 5", "12.50", "0.91", "&#34;seed&#34;: 7"):
        assert shown in text
    words = re.sub(r"base64,[^\"]+|[Pp]rovenance", "", text)
    assert "nan" not in words.lower()


def test_measures_of_the_set_stand_beside_those_of_real_cases(tmp_path):
    make_set(tmp_path)

    def realism(speckle, spectrum, auc):
        return {"edge_speckle_ratio": speckle, "spectrum_ratio": spectrum, "two_sample_auc": {"mean": auc, "sd": 0.01}}

    measures = {
        "cases": {"synthetic": 2, "training": 9, "held_out": 3},
        "kernel_distance": {
            f"{pair}": {"value": value}
            for pair, value in (("training_held_out", 0.01), ("synthetic_training", 0.5), ("synthetic_held_out", 0.75))
        },
        "memorisation": {key: {"p50": 0.875} for key in ("distance_ratio", "distance_ratio_of_held_out")},
        "ms_ssim": {key: {"mean": 0.625} for key in ("synthetic", "training")},
        "local_correlation": {key: {"p95": 0.375} for key in ("synthetic", "held_out")},
        "realism": {
            "synthetic_training": realism(1.25, [1.0, 0.8125, None, 1.125, 1.0], 0.6875),
            "held_out_training": realism(1.0, [None] * 5, 0.53125),
        },
        "largest_shifts": [],
        "near_duplicates": [],
    }
    (tmp_path / "set_metrics.json").write_text(json.dumps(measures))
    text = open(report(tmp_path), encoding="utf-8").read()
    rows = {
        name: re.findall(r">([^<]*)</td>", cells) for name, cells in re.findall(r"<tr><td>(.*?)</td>(.*?)</tr>", text)
    }
    assert rows["speckle at edges, ratio to training cases"] == ["1.25", "1.00"]
    assert rows["spectrum inside labels, ratio to training cases, farthest band"][0] == "0.81"
    assert rows["AUC of a network that tells patches from those of training cases"] == ["0.69", "0.53"]
    del measures["realism"]
    (tmp_path / "set_metrics.json").write_text(json.dumps(measures))
    assert "AUC of a network" not in open(report(tmp_path), encoding="utf-8").read()


def test_segmenters_stand_beside_each_other_with_their_pictures(tmp_path):
    make_set(tmp_path)
    for name, dice in (("a", 0.5), ("b", 0.75)):
        folder = tmp_path / name
        (folder / "pictures").mkdir(parents=True)
        header = "case,label,dice,cl_dice,hd95_mm,betti_error_0\n"
        rows = f"p1,wall,{dice},,2.0,0\np1,vessel,0.25,{dice},,3\n"
        (folder / "labels.csv").write_text(header + rows)
        (folder / "pictures/p1.png").write_bytes(b"\x89PNG picture of " + name.encode())
    evaluations = {"real <only>": str(tmp_path / "a"), "with synthetic": str(tmp_path / "b")}
    text = open(report(tmp_path, evaluations=evaluations), encoding="utf-8").read()
    page = Page(text)
    assert page.open == []
    row = re.search(r"<tr><td>cl_dice, vessel</td><td>with synthetic</td>(.*?)</tr>", text).group(1)
    assert re.findall(r">([^<]+)</td>", row) == ["0.75", "0.25", "1 of 1"]
    assert "minus real &lt;only&gt;" in text
    assert base64.b64encode(b"\x89PNG picture of b").decode() in text


def test_a_large_set_pictures_best_and_worst_only(tmp_path):
    make_set(tmp_path, cases=6, rejected=0)
    text = open(report(tmp_path, max_cases=2), encoding="utf-8").read()
    assert [f'alt="case_{i},' in text for i in range(6)] == [True, False, False, False, False, True]


def test_missing_and_empty_sets_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no synthetic data set; run synthesize.json first"):
        report(tmp_path)
    (tmp_path / "datalist.json").write_text(json.dumps({"training": [], "rejected": [], "provenance": {}}))
    with pytest.raises(ValueError, match=r"the data set is empty"):
        report(tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Chromium: apt-get install chromium")
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_all_pictures_without_an_error(tmp_path, width):
    make_set(tmp_path)
    page = tmp_path / "page.html"
    count = "[...document.images].filter(i => i.complete && i.naturalWidth > 0).length"
    wide = "document.documentElement.scrollWidth <= window.innerWidth"
    script = (
        f"<script>addEventListener('load', () => document.title = 'shown ' + {count} + ' fits ' + ({wide}))</script>"
    )
    page.write_text(open(report(tmp_path), encoding="utf-8").read() + script)
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--enable-logging=stderr"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},800", "--virtual-time-budget=5000"]
    done = subprocess.run(
        [*command, "--dump-dom", f"file://{page}"], capture_output=True, text=True, timeout=120, check=True
    )
    assert re.search(r"<title>shown 5 fits true</title>", done.stdout), done.stdout[:300]
    assert "CONSOLE" not in done.stderr

"""The report of a synthetic data set: one page that holds everything it shows."""

from __future__ import annotations

import base64
import gzip
import json
import re
from importlib.metadata import PackageNotFoundError
from unittest import mock

import nibabel as nib
import numpy as np
import pytest
from custom.synthesis.report import MAX_BYTES, write_report
from report_sets import NAMES, REASONS, Page, make_set

PICTURES = r"data:image/(\w+);base64,([^\"]+)"
SIGNS = {"png": b"\x89PNG", "webp": b"RIFF"}


def report(folder, **changes):
    return write_report(str(folder), label_names=NAMES, vessel_labels=[3], **changes)


def page_of(folder, **changes):
    return open(report(folder, **changes), encoding="utf-8").read()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The page of two cases that were accepted and one that was not."""
    folder = tmp_path_factory.mktemp("set")
    make_set(folder)
    return page_of(folder)


def volumes_of(text):
    return json.loads(re.search(r'(?s)id="volumes">(.*?)</script>', text).group(1))


def without_data(text):
    """A page without library, volumes and pictures."""
    return re.sub(r"base64,[^\"]+|(?s:<script type=\"(application/\w+|module)\".*?</script>)", "", text)


def test_the_page_is_whole_and_needs_nothing_else(whole):
    text, page = whole, Page(whole)
    assert page.open == []
    assert all(link.startswith(("data:", "#")) for link in page.links)
    assert "default-src 'none'" in text
    assert not re.search(r"https?://|@import|url\(", without_data(text).split("Licence of the viewer")[0])
    pictures = re.findall(PICTURES, text)
    assert [kind for kind, _ in pictures] == ["webp"] * 2 + ["png"] * 3 + ["webp"]  # cases, distributions, kept apart
    assert all(base64.b64decode(content).startswith(SIGNS[kind]) for kind, content in pictures)
    assert page.tags.count("script") == 3  # library, volumes, viewer: what stands in provenance and names is text


def test_pictures_come_first_and_tables_last(whole):
    text = whole
    assert Page(text).headings[:5] == ["pictures", "viewer-title", "distributions", "apart", "details"]
    assert text.index("data:image/webp") < text.index("<canvas") < text.index("data:image/png") < text.index("<table")


def test_a_name_with_markup_is_text_everywhere(tmp_path):
    make_set(tmp_path, name="<script>alert(1)<!--&", rejected=1)
    text = page_of(tmp_path, max_cases=1)
    assert "<script>alert" not in text
    assert Page(text).tags.count("script") == 3
    assert "&lt;script&gt;alert(1)&lt;!--&amp;_0" in text
    assert volumes_of(text)["cases"][0]["case"] == "<script>alert(1)<!--&_1"


def test_everything_that_was_recorded_is_shown(whole):
    text = whole
    assert "2 cases accepted, 1 kept apart" in text
    assert "not for clinical use" in text
    for shown in ("case_0", "case_1", "case_2", *REASONS, "12.50", "0.91", "&#34;seed&#34;: 7"):
        assert shown in text
    assert "Expected to be wrong by 9.0 HU" in text
    assert "Blood &lt;&amp;&gt;: 75 HU brighter on average than in the template (60.0 HU are allowed)" in text
    words = without_data(text).split("Licence of the viewer")[0]
    assert "nan" not in re.sub("[Pp]rovenance", "", words).lower()


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
    text = page_of(tmp_path, max_cases=1)
    rows = {
        name: re.findall(r">([^<]*)</td>", cells) for name, cells in re.findall(r"<tr><td>(.*?)</td>(.*?)</tr>", text)
    }
    assert rows["speckle at edges, ratio to training cases"] == ["1.25", "1.00"]
    assert rows["spectrum inside labels, ratio to training cases, farthest band"][0] == "0.81"
    assert rows["AUC of a network that tells patches from those of training cases"] == ["0.69", "0.53"]
    del measures["realism"]
    (tmp_path / "set_metrics.json").write_text(json.dumps(measures))
    assert "AUC of a network" not in page_of(tmp_path, max_cases=1)


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
    text = page_of(tmp_path, evaluations=evaluations, max_cases=1)
    page = Page(text)
    assert page.open == []
    assert page.headings[4] == "segmenters"
    assert 'alt="Dice: with synthetic minus real &lt;only&gt;"' in text
    assert 'alt="clDice of the centre lines: with synthetic minus real &lt;only&gt;"' in text
    assert "One case is one patient" in text
    row = re.search(r"<tr><td>cl_dice, vessel</td><td>with synthetic</td>(.*?)</tr>", text).group(1)
    assert re.findall(r">([^<]+)</td>", row) == ["0.75", "0.25", "1 of 1"]
    assert "minus real &lt;only&gt;" in text
    assert base64.b64encode(b"\x89PNG picture of b").decode() in text


def test_a_large_set_pictures_best_and_worst_only(tmp_path):
    make_set(tmp_path, cases=6, rejected=0)
    text = page_of(tmp_path, max_cases=2)
    assert [f'alt="case_{i},' in text for i in range(6)] == [True, False, False, False, False, True]


def test_missing_and_empty_sets_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no synthetic data set; run synthesize.json first"):
        report(tmp_path)
    (tmp_path / "datalist.json").write_text(json.dumps({"training": [], "rejected": [], "provenance": {}}))
    with pytest.raises(ValueError, match=r"the data set is empty"):
        report(tmp_path)


def test_a_set_of_which_nothing_was_accepted_says_so_and_can_be_viewed(tmp_path):
    make_set(tmp_path, cases=2, rejected=2)
    text = page_of(tmp_path)
    assert "0 cases accepted, 2 kept apart" in text
    assert "No case was accepted; see what was kept apart and why." in text
    assert "There is no accepted case to compare." in text
    assert len(re.findall(PICTURES, text)) == 2
    assert [case["note"] for case in volumes_of(text)["cases"]] == ["kept apart"] * 2


def test_a_set_of_one_case_has_a_page(tmp_path):
    make_set(tmp_path, cases=1, rejected=0)
    text = page_of(tmp_path)
    assert len(volumes_of(text)["cases"]) == 1
    assert '<h2 id="apart">Kept apart</h2>\n<p>None.</p>' in text
    assert "segmenters" not in Page(text).headings


def test_a_template_that_is_gone_is_named(tmp_path):
    make_set(tmp_path)
    (tmp_path / "templates/image.nii.gz").unlink()
    with pytest.raises(FileNotFoundError, match=r"templates/image.nii.gz"):
        report(tmp_path)


def test_without_its_package_the_page_has_no_viewer_and_says_why(tmp_path):
    make_set(tmp_path)
    with mock.patch("custom.synthesis.page.niivue.distribution", side_effect=PackageNotFoundError):
        text = page_of(tmp_path)
    assert "No viewer: the package ipyniivue is not installed; pip install --no-deps ipyniivue==" in text
    page = Page(text)
    assert page.open == []
    assert not {"script", "canvas"} & set(page.tags)
    assert len(re.findall(PICTURES, text)) == 6


def test_a_page_keeps_its_size_by_coarser_volumes_fewer_cases_and_fewer_pictures(tmp_path):
    make_set(tmp_path, cases=3, rejected=0)
    whole = page_of(tmp_path)
    assert len(whole.encode()) < MAX_BYTES
    assert len(volumes_of(whole)["cases"]) == 3
    for share in (0.95, 0.3):
        limit = round(share * len(whole))
        text = page_of(tmp_path, max_bytes=limit)
        assert len(text.encode()) <= limit
    assert text.count("data:image/webp") < whole.count("data:image/webp")
    assert "No viewer: even one case is too large for a page of" in text
    assert Page(text).open == []


def test_volumes_of_the_viewer_lie_heart_on_heart_in_hu(whole):
    data = volumes_of(whole)
    assert [label["name"] for label in data["labels"]] == NAMES
    template = data["templates"][data["cases"][0]["template"]]
    for parts, names in ((data["cases"][0]["synthetic"], ["image", "label", "doubt"]), (template, ["image", "label"])):
        assert sorted(parts) == sorted(names)
        images = {name: nib.Nifti1Image.from_bytes(gzip.decompress(base64.b64decode(parts[name]))) for name in names}
        assert nib.aff2axcodes(images["image"].affine) == ("R", "A", "S")
        label, hu = (np.asarray(images[name].dataobj) for name in ("label", "image"))
        at = (np.argwhere(label > 0).mean(0) @ images["label"].affine[:3, :3]) + images["label"].affine[:3, 3]
        assert np.abs(at).max() <= 0.5
        assert abs(hu[label == 2].mean() - 400) < 5
        assert set(np.unique(label)) == {0, 1, 2, 3}

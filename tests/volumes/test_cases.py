"""Lists of cases: what is read, what is refused and by which name."""

import json

import pytest
from custom.segmentation.cases import pretraining_cases
from custom.volumes.cases import (
    case_name,
    check_files,
    check_names,
    load_cases,
    rendering_cases,
    segmentation_cases,
    validation_cases,
)


@pytest.fixture
def folder(tmp_path):
    """A datalist of two training cases and one for validation, beside its files."""
    for name in ("images/a.nii.gz", "images/b.nii.gz", "labels/a.nii.gz", "labels/b.nii.gz", "c.nii", "d.nii"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    write(
        tmp_path / "datalist.json",
        training=[
            {"image": "images/a.nii.gz", "label": "labels/a.nii.gz", "weight": 2.5, "age": 60},
            {"image": "images/b.nii.gz", "label": "labels/b.nii.gz"},
        ],
        validation=[{"image": "c.nii", "label": "d.nii"}],
    )
    return tmp_path


def write(path, **sections):
    path.write_text(json.dumps(sections))
    return str(path)


@pytest.mark.parametrize(
    ("path", "name"),
    [("/x/a.nii.gz", "a"), ("a.nii", "a"), ("b.c/a.v1.nii.gz", "a.v1"), ("a.nii.nii.gz", "a.nii"), ("a", "a")],
)
def test_case_name_drops_folder_and_ending(path, name):
    assert case_name(path) == name


def test_cases_have_absolute_paths_name_and_weight_and_nothing_else(folder):
    first, second = load_cases(str(folder / "datalist.json"), "training")
    assert first == {
        "image": str(folder / "images/a.nii.gz"),
        "label": str(folder / "labels/a.nii.gz"),
        "case": "a",
        "weight": 2.5,
    }
    assert (second["case"], second["weight"]) == ("b", 1.0)


def test_relative_paths_are_relative_to_the_datalist_not_to_the_working_directory(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder / "images")
    (case,) = load_cases("../datalist.json", "validation")
    assert case["case"] == "d"
    assert case["image"] == str(folder / "c.nii")


def test_absolute_paths_are_kept(folder, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    item = {"image": str(folder / "c.nii"), "label": str(folder / "d.nii")}
    (case,) = load_cases(write(tmp_path / "elsewhere/list.json", training=[item]), "training")
    assert case["image"] == item["image"]


def test_datalists_are_read_in_order_the_limit_holds_for_each(folder):
    other = write(folder / "other.json", training=[{"image": "c.nii", "label": "d.nii"}] * 2)
    lists = [other, str(folder / "datalist.json")]
    assert [case["case"] for case in load_cases(lists, "training")] == ["d", "d", "a", "b"]
    assert [case["case"] for case in load_cases(lists, "training", limit=1)] == ["d", "a"]


def test_a_datalist_without_the_section_adds_nothing(folder):
    other = write(folder / "other.json", training=[{"image": "c.nii", "label": "d.nii"}], test=[])
    lists = [other, str(folder / "datalist.json")]
    assert [case["case"] for case in load_cases(lists, "validation")] == ["d"]
    assert [case["case"] for case in load_cases(lists, ["validation", "test", "training"])] == ["d", "d", "a", "b"]


@pytest.mark.parametrize("section", ["training", "test", "tset"])
def test_no_case_at_all_is_refused(folder, section):
    path = write(folder / "empty.json", training=[], test=[])
    with pytest.raises(ValueError, match=rf"empty\.json.*: no case in section '{section}'; check the section names"):
        load_cases([path], section)


def test_missing_datalist_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.json: datalist not found; set `dataset_dir` or `datalists`"):
        load_cases(str(tmp_path / "nowhere.json"), "training")


@pytest.mark.parametrize(
    "content",
    [b'{"training": [', b"", b"\xff\xfe\x00garbage", b'{"training": ["a.nii.gz"]}', b'{"training": {"image": "a"}}'],
    ids=["cut short", "empty", "binary", "names only", "no list"],
)
def test_malformed_datalist_is_named_even_beside_a_good_one(folder, content):
    bad = folder / "bad.json"
    bad.write_bytes(content)
    with pytest.raises(ValueError, match=r"bad\.json: must be JSON with lists of cases"):
        load_cases([str(folder / "datalist.json"), str(bad)], "training")


def test_case_without_a_key_is_refused_with_list_section_and_key(folder):
    path = write(folder / "partial.json", training=[{"image": "c.nii"}])
    with pytest.raises(ValueError, match=r"partial\.json: a case of 'training' has no \['label'\]"):
        load_cases(path, "training")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"image": None}, r"odd\.json: image must be the name of a file, got None"),
        ({"confidence": 3}, r"odd\.json: confidence must be the name of a file, got 3"),
        ({"weight": -1}, r"odd\.json: weight must be a number, at least 0, got -1"),
        ({"weight": float("inf")}, r"odd\.json: weight must be a number, at least 0, got inf"),
        ({"weight": True}, r"odd\.json: weight must be a number, at least 0, got True"),
        ({"score_hu": None}, r"odd\.json: score_hu must be a number, at least 0, got None"),
        ({"score_hu": -0.5}, r"odd\.json: score_hu must be a number, at least 0, got -0\.5"),
    ],
)
def test_odd_entries_are_refused_with_list_case_and_rule(folder, entry, message):
    path = write(folder / "odd.json", training=[{"image": "c.nii", "label": "d.nii", **entry}])
    with pytest.raises(ValueError, match=message) as caught:
        pretraining_cases(path, "training")
    assert "d.nii" in str(caught.value)


def test_a_section_that_would_never_be_drawn_is_refused(folder):
    path = write(folder / "never.json", training=[{"image": "c.nii", "label": "d.nii", "weight": 0}])
    with pytest.raises(ValueError, match=r"never\.json: weight is 0 for all cases of section 'training'"):
        load_cases(path, "training")


def test_all_missing_files_are_named_at_once_and_existing_ones_are_not(folder):
    path = write(
        folder / "gone.json",
        training=[{"image": "c.nii", "label": "gone_1.nii"}, {"image": "gone_2.nii", "label": "gone_1.nii"}],
    )
    with pytest.raises(FileNotFoundError, match=r"gone\.json.*: 2 listed files do not exist") as caught:
        load_cases(path, "training")
    assert all(str(folder / name) in str(caught.value) for name in ("gone_1.nii", "gone_2.nii"))
    assert str(folder / "c.nii") not in str(caught.value)


def test_a_folder_is_not_a_file(folder):
    with pytest.raises(FileNotFoundError, match=r"the list: 1 listed files do not exist: .*images"):
        check_files([{"image": str(folder / "images"), "case": "anything"}], "the list")


@pytest.fixture
def templates(folder):
    return [
        {"image": str(folder / "images" / name), "label": str(folder / "labels" / name)}
        for name in ("a.nii.gz", "b.nii.gz")
    ]


def test_every_mask_is_rendered_with_every_template(folder, templates):
    masks = [str(folder / "c.nii"), str(folder / "d.nii")]
    cases = rendering_cases(masks, templates)
    assert [case["case"] for case in cases] == ["c_from_a", "c_from_b", "d_from_a", "d_from_b"]
    assert cases[1] == {
        "label": masks[0],
        "case": "c_from_b",
        "template_image": templates[1]["image"],
        "template_label": templates[1]["label"],
    }


def test_masks_are_rendered_once_each_without_templates(folder):
    assert rendering_cases([str(folder / "c.nii")], []) == [{"label": str(folder / "c.nii"), "case": "c"}]


def test_one_text_instead_of_a_list_of_masks_is_refused():
    with pytest.raises(TypeError, match=r"target_masks: must be a list of files, got the text 'm\.nii'; write \['m"):
        rendering_cases("m.nii", [])


@pytest.mark.parametrize("wrong", ["a.nii", {"image": "a.nii"}, {"image": "a.nii", "label": 3}])
def test_a_template_that_is_no_pair_is_refused_with_what_it_must_be(folder, templates, wrong):
    with pytest.raises(TypeError, match=r"templates: must be a list of \{'image': FILE, 'label': FILE\}, got .*a\.nii"):
        rendering_cases([str(folder / "c.nii")], [templates[0], wrong])


@pytest.mark.parametrize(("make", "option"), [(segmentation_cases, "images"), (rendering_cases, "target_masks")])
def test_a_number_is_no_file(make, option):
    more = {"templates": []} if make is rendering_cases else {}
    with pytest.raises(TypeError, match=rf"{option}: must be a list of files, got 2024 in it; write names of files"):
        make(["a.nii", 2024], **more)


def test_no_mask_is_refused(templates):
    with pytest.raises(ValueError, match="no target label map found; set `target_masks`"):
        rendering_cases([], templates)


def test_masks_and_templates_of_one_name_are_told_apart_by_their_folders(folder, templates):
    masks = [str(folder / "images/a.nii.gz"), str(folder / "labels/a.nii.gz"), str(folder / "c.nii")]
    assert [case["case"] for case in rendering_cases(masks, [])] == ["images_a", "labels_a", "c"]
    pairs = [{"image": mask, "label": masks[1]} for mask in masks[:2]]
    cases = rendering_cases(masks[2:], pairs)
    assert [case["case"] for case in cases] == ["c_from_images_a", "c_from_labels_a"]


def test_masks_listed_twice_are_refused_because_results_would_overwrite_each_other(folder):
    masks = [str(folder / "images/a.nii.gz"), str(folder / "images/../images/a.nii.gz"), str(folder / "c.nii")]
    with pytest.raises(
        ValueError, match=r"file names must differ, they give \['a'\] more than once; rename them"
    ) as no:
        rendering_cases(masks, [])
    assert str(no.value).endswith("list each file once")


def test_cases_of_one_name_are_named_by_their_folders_in_any_order(folder):
    items = [{"image": "c.nii", "label": f"{place}/a.nii.gz"} for place in ("images", "labels")]
    for order in (items, items[::-1]):
        cases = load_cases(write(folder / "same.json", training=order), "training")
        assert {case["label"]: case["case"] for case in cases} == {
            str(folder / "images/a.nii.gz"): "images_a",
            str(folder / "labels/a.nii.gz"): "labels_a",
        }


def test_images_that_share_a_label_have_a_name_each(folder):
    items = [{"image": name, "label": "d.nii"} for name in ("c.nii", "images/a.nii.gz")]
    items.append({"image": "images/b.nii.gz", "label": "labels/b.nii.gz"})
    cases = load_cases(write(folder / "shared.json", training=items), "training")
    assert [case["case"] for case in cases] == ["c", "a", "b"]


@pytest.mark.parametrize(("ending", "key"), [(".mha", "image"), (".nrrd", "label"), (".dcm", "image")])
def test_files_of_another_format_are_refused_with_how_to_convert_them(folder, ending, key):
    item = {"image": "c.nii", "label": "d.nii", key: f"scan{ending}"}
    with pytest.raises(ValueError, match=rf"scan\{ending}: only NIfTI files are read.*convert it first"):
        load_cases(write(folder / "other.json", training=[item]), "training")
    with pytest.raises(ValueError, match=rf"scan\{ending}: only NIfTI files are read"):
        rendering_cases([str(folder / f"scan{ending}")], [])


def test_what_a_list_says_of_its_labels_is_handed_on(folder):
    items = [{"image": "c.nii", "label": "d.nii", "mapped_label": stated} for stated in (True, False)]
    cases = load_cases(
        write(folder / "mapped.json", training=[*items, {"image": "c.nii", "label": "d.nii"}]), "training"
    )
    assert [case.get("mapped_label") for case in cases] == [True, False, None]
    with pytest.raises(ValueError, match=r"odd\.json: mapped_label must be true or false, got 'yes'"):
        load_cases(
            write(folder / "odd.json", training=[{"image": "c.nii", "label": "d.nii", "mapped_label": "yes"}]),
            "training",
        )


@pytest.mark.parametrize("record", ["generation.json", "synthesis.json"])
def test_labels_in_the_folder_of_a_run_are_known_to_be_mapped_however_they_are_listed(folder, templates, record):
    (folder / record).touch()
    own = load_cases(write(folder / "own.json", training=[{"image": "c.nii", "label": "labels/a.nii.gz"}]), "training")
    assert own[0]["mapped_label"] is True
    (case,) = rendering_cases([templates[1]["label"]], templates[:1])
    assert case["mapped_label"] is case["mapped_template_label"] is True
    (case,) = rendering_cases([str(folder / "c.nii")], [{**templates[0], "mapped_label": False}])
    assert "mapped_label" not in case, "beside the record, not in a folder of the run"
    assert case["mapped_template_label"] is False


def test_missing_masks_and_templates_are_named_at_once(folder, templates):
    templates[0]["label"] = str(folder / "no_template.nii")
    with pytest.raises(FileNotFoundError, match="2 listed files do not exist") as caught:
        rendering_cases([str(folder / "no_mask.nii"), str(folder / "c.nii")], templates)
    assert all(str(folder / name) in str(caught.value) for name in ("no_mask.nii", "no_template.nii"))


def test_a_list_without_validation_cases_is_refused_and_an_interval_of_0_asks_for_none(folder):
    path = write(folder / "few.json", training=[{"image": "images/a.nii.gz", "label": "labels/a.nii.gz"}])
    assert validation_cases(path, "validation", interval=0) == []
    assert validation_cases("nowhere.json", "validation", interval=0) == []
    with pytest.raises(ValueError, match="no case in section 'validation'; .*, or set `val_interval` 0 to train"):
        validation_cases(path, "validation", interval=2)
    with pytest.raises(FileNotFoundError, match="nowhere.json: datalist not found"):
        validation_cases("nowhere.json", "validation", interval=2)
    (case,) = validation_cases(str(folder / "datalist.json"), "validation", interval=2, limit=1)
    assert case["image"] == str(folder / "c.nii")


def test_cases_of_one_name_are_refused():
    with pytest.raises(
        ValueError, match=r"masks: file names must differ, they give \['a'\] more than once; rename them"
    ):
        check_names([{"case": "a"}, {"case": "b"}, {"case": "a"}], "masks")


def test_what_is_segmented_keeps_its_folders_below_the_deepest_or_the_given_one(folder, monkeypatch):
    monkeypatch.chdir(folder)
    images = ["images/a.nii.gz", "../" + folder.name + "/labels/b.nii.gz", "d.nii"]
    cases = segmentation_cases(images)
    assert [case["case"] for case in cases] == ["images/a_seg", "labels/b_seg", "d_seg"]
    files = [folder / name for name in ("images/a.nii.gz", "labels/b.nii.gz", "d.nii")]
    assert [case["image"] for case in cases] == [str(file) for file in files]
    assert segmentation_cases(images[:1]) == [{"image": str(folder / "images/a.nii.gz"), "case": "a_seg"}]
    assert segmentation_cases(images[:1], ".")[0]["case"] == "images/a_seg"
    assert segmentation_cases([]) == []


def test_images_outside_the_given_folder_are_refused(folder):
    with pytest.raises(ValueError, match=r"images_root: must be a folder that all images lie below, got .*/images"):
        segmentation_cases([str(folder / "d.nii")], str(folder / "images"))


def test_one_text_is_no_list_of_images():
    with pytest.raises(TypeError, match=r"images: must be a list of files, got the text 'a\.nii'; write \['a\.nii'\]"):
        segmentation_cases("a.nii")

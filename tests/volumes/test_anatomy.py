"""One table for the label map: every list is a column, and what makes no sense is refused by row."""

import pytest
from custom.volumes.anatomy import Anatomy, Label

ROWS = {
    "0": {"name": "background", "nominal_hu": -60, "class_weight": 0.5},
    "2": {"name": "aorta", "nominal_hu": 400, "plausible_hu": [100, 800], "homogeneous": True, "contrast_sd_hu": 20},
    "1": {"name": "wall", "nominal_hu": 100, "wall": True, "handles": 1, "keep": True, "aligns": False},
    "3": {
        "name": "vessel",
        "nominal_hu": 330,
        "thin": True,
        "components": 2,
        "touches": [2],
        "class_weight": 6,
        "pool": "left",
    },
}


def changed(key, **columns):
    return {**ROWS, key: {**ROWS[key], **columns}}


def test_every_list_is_a_column_in_the_order_of_the_ids():
    anatomy = Anatomy(ROWS)
    assert anatomy.num_labels == 4
    assert anatomy.names == ["background", "wall", "aorta", "vessel"]
    assert anatomy.foreground == [1, 2, 3]
    assert anatomy.nominal_hu == [-60, 100, 400, 330]
    assert anatomy.plausible_hu == {2: [100, 800]}
    assert anatomy.contrast_sd_hu == [0, 0, 20, 0]
    assert anatomy.pool == [None, None, None, "left"]
    assert anatomy.class_weights == [0.5, 1, 1, 6]
    assert (anatomy.thin, anatomy.homogeneous, anatomy.origins) == ([3], [2], [2])


def test_what_a_row_leaves_out_has_its_default_and_the_background_is_no_structure():
    structures = Anatomy(ROWS).structures
    assert sorted(structures) == [1, 2, 3]
    assert structures[2] == Label("aorta", nominal_hu=400, plausible_hu=[100, 800], homogeneous=True, contrast_sd_hu=20)
    assert (structures[1].handles, structures[1].keep, structures[1].components) == (1, True, 1)


def test_thin_labels_do_not_align_unless_they_are_told_to():
    assert Anatomy(ROWS).aligning == [2]  # the wall is told not to
    assert Anatomy(changed("3", aligns=True)).aligning == [2, 3]


def test_ids_may_be_numbers_or_texts():
    assert Anatomy({int(k): row for k, row in ROWS.items()}).names == Anatomy(ROWS).names


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({**ROWS, "aorta": {"name": "x"}}, "rows are keyed by label ids, got 'aorta'"),
        (
            {**ROWS, "5": {"name": "x"}},
            r"without gaps, got \[0, 1, 2, 3, 5\]; renumber the labels with `label_mapping`",
        ),
        ({"0": {"name": "background"}}, r"without gaps, got \[0\]"),
        (changed("3", name="aorta"), "every label needs a name of its own"),
        (changed("3", tuches=[2]), r"row 3 has unknown columns \['tuches'\] or no name; the columns are \['name'"),
        ({**ROWS, "3": {"thin": True}}, r"row 3 has unknown columns \[\] or no name"),
        (changed("3", touches=[7]), r"vessel must touch \[7\], which are no other labels of the table"),
        (changed("3", touches=[3]), r"vessel must touch \[3\]"),
        (changed("3", touches=[0]), r"vessel must touch \[0\]"),
        (changed("3", components=0), "vessel: components must be at least 1, got 0; leave the label out"),
        (changed("1", handles=-1), "wall: handles must not be negative, got -1"),
        (changed("2", class_weight=0), "aorta: class_weight must be above 0, got 0"),
        (changed("2", pieces_kept=3), "aorta: pieces_kept must be 1, 2 or null for all, got 3"),
        (changed("2", plausible_hu=[800, 100]), r"aorta: plausible_hu must be \[lowest, highest\] mean or null"),
        (changed("2", pool=3), "aorta: pool must be a text or null, got 3"),
        (changed("2", pool=" "), "aorta: pool must be a text or null, got ' '"),
        (changed("2", contrast_sd_hu=-1), "aorta: contrast_sd_hu must not be negative, got -1"),
    ],
)
def test_a_table_that_makes_no_sense_is_refused_by_row(rows, message):
    with pytest.raises(ValueError, match=message):
        Anatomy(rows)


@pytest.mark.parametrize("word", ["true", "True", "FALSE", "false"])
def test_words_that_the_command_line_hands_on_are_switches(word):
    rows = changed("3", thin=word, touches=[2])
    assert Anatomy(rows).labels[3].thin is (word.lower() == "true")


def test_a_label_without_nominal_hu_is_named_when_something_is_painted():
    rows = changed("3", nominal_hu=None)
    assert Anatomy(rows).thin == [3]
    with pytest.raises(ValueError, match=r"nominal_hu is needed to paint \['vessel'\]; add it to their rows"):
        Anatomy(rows).nominal_hu  # noqa: B018

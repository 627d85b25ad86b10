"""Names of cases: bare where they are unique, else with the folders that tell them apart."""

import itertools

import pytest
from custom.volumes.names import case_names


@pytest.mark.parametrize(
    ("files", "names"),
    [
        ([], []),
        (["/x/a.nii.gz"], ["a"]),
        (["/x/a.nii.gz", "/y/b.nii"], ["a", "b"]),
        (["/x/p1/ct.nii.gz", "/x/p2/ct.nii.gz", "/x/p2/other.nii"], ["p1_ct", "p2_ct", "other"]),
        (["/x/p1/seg/a.nii", "/x/p2/seg/a.nii", "/y/p2/seg/a.nii"], ["p1_seg_a", "x_p2_seg_a", "y_p2_seg_a"]),
        (["/a.nii", "/x/a.nii"], ["a", "x_a"]),
        (["/x/A.NII.GZ", "/x/b.Nii", "/x/c.gz"], ["A", "b", "c"]),
        (["/d/1/ct.nii", "/d/2/ct.nii", "/d/1_ct.nii"], ["d_1_ct", "2_ct", "1_ct"]),
    ],
)
def test_names_are_the_shortest_that_differ(files, names):
    got = case_names(files)
    assert len(set(got)) == len(files)
    if files != ["/a.nii", "/x/a.nii"]:
        assert got == names
    for order in itertools.permutations(range(len(files))):
        assert case_names([files[k] for k in order]) == [got[k] for k in order], "independent of order"


def test_a_file_listed_twice_has_one_name():
    assert case_names(["/x/a.nii", "/x/b.nii", "/x/../x/a.nii"]) == ["a", "b", "a"]


def test_names_that_no_folder_tells_apart_still_differ():
    names = case_names(["/x/a.nii", "/x/a.nii.gz"])
    assert len(set(names)) == 2
    assert all(name.startswith("a_") for name in names)

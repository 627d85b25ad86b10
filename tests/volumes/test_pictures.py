"""Volumes for pictures."""

import nibabel as nib
import numpy as np
import pytest
from custom.volumes.pictures import read_ras, save_mask_sheet, save_sheet


@pytest.mark.parametrize("codes", ["RAS", "LPS", "SAR"])
def test_a_file_is_read_as_ras_whatever_its_axes(tmp_path, codes):
    volume = np.arange(2 * 3 * 4, dtype=np.int16).reshape(2, 3, 4)
    turn = nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(codes))
    path = tmp_path / "volume.nii.gz"
    nib.save(nib.Nifti1Image(volume, np.eye(4)).as_reoriented(turn), path)
    read = read_ras(path)
    assert type(read) is np.ndarray
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, volume)


def test_a_title_is_text_whatever_signs_it_holds(tmp_path):
    label = np.zeros((6, 6, 6), np.uint8)
    label[2:4, 2:4, 2:4] = 1
    for title in ("cost $5$", "a$_b", "{x} % \\alpha é"):
        save_sheet(tmp_path / "image.png", [(title, label * 100.0, label)], vessel_labels=[1])
        save_mask_sheet(tmp_path / "mask.png", [(title, label)], vessel_labels=[1])
    assert (tmp_path / "mask.png").stat().st_size > 1000

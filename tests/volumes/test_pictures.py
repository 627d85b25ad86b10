"""Volumes for pictures."""

import nibabel as nib
import numpy as np
import pytest

from custom.volumes.pictures import read_ras


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

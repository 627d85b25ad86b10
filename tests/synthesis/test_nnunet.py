"""A raw data set of nnU-Net: its files, its labels, and nnU-Net's own check where it is installed."""

from __future__ import annotations

import json
import os
import subprocess

import nibabel as nib
import numpy as np
import pytest
from custom.synthesis.nnunet import export_nnunet
from custom.volumes.anatomy import Anatomy

LABELS = Anatomy({0: {"name": "background"}, 1: {"name": "left ventricle"}, 2: {"name": "aorta"}})
MAPPING = {"from": [7], "to": [2]}
AFFINE = np.diag([1.5, 1.2, 2.0, 1.0])


@pytest.fixture
def datalist(tmp_path):
    rng = np.random.default_rng(0)
    items = []
    for k, ending in enumerate((".nii.gz", ".nii")):
        ids = np.zeros((12, 14, 10), np.uint8)
        ids[3:6], ids[7:9] = 1, 7
        hu = (np.choose(ids // 3, [0, 0, 400]) + rng.normal(0, 20, ids.shape)).astype(np.int16)
        for kind, values in (("image", hu), ("label", ids), ("confidence", np.full(ids.shape, 0.25, np.float32))):
            nib.save(nib.Nifti1Image(values, AFFINE), tmp_path / f"{kind}{k}{ending}")
        item = {kind: f"{kind}{k}{ending}" for kind in ("image", "label")}
        items.append(item | ({"confidence": f"confidence{k}{ending}"} if not k else {}))
    (tmp_path / "datalist.json").write_text(json.dumps({"training": items}))
    return tmp_path / "datalist.json"


def export(datalist, folder, **options):
    return export_nnunet(str(datalist), str(folder), labels=LABELS, label_mapping=MAPPING, **options)


def test_images_labels_and_confidence_lie_where_nnunet_looks(datalist, tmp_path):
    root = tmp_path / "raw/Dataset501_Synthetic"
    assert export(datalist, root) == 2
    files = sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())
    assert files == [
        *("confidenceTr/label0.nii.gz", "dataset.json", "imagesTr/label0_0000.nii.gz", "imagesTr/label1_0000.nii.gz"),
        *("labelsTr/label0.nii.gz", "labelsTr/label1.nii.gz"),
    ]
    described = json.loads((root / "dataset.json").read_text())
    assert described == {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, "left ventricle": 1, "aorta": 2},
        "numTraining": 2,
        "file_ending": ".nii.gz",
    }
    for k, ending in enumerate((".nii.gz", ".nii")):
        image, label = nib.load(root / f"imagesTr/label{k}_0000.nii.gz"), nib.load(root / f"labelsTr/label{k}.nii.gz")
        np.testing.assert_array_equal(image.dataobj, nib.load(tmp_path / f"image{k}{ending}").dataobj)
        np.testing.assert_allclose(image.affine, AFFINE, atol=1e-6)
        np.testing.assert_allclose(label.affine, AFFINE, atol=1e-6)
        assert set(np.unique(label.dataobj)) == {0, 1, 2}, "ids are those of dataset.json"


def test_it_goes_on_after_an_interruption_and_mixes_no_sets(datalist, tmp_path):
    root = tmp_path / "Dataset501_Synthetic"
    export(datalist, root)
    (root / "dataset.json").unlink()
    assert export(datalist, root) == 2
    (root / "labelsTr/other.nii.gz").touch()
    with pytest.raises(ValueError, match=r"holds cases that are not in .*\['other.nii.gz'\]; choose a new folder"):
        export(datalist, root)


@pytest.mark.parametrize("name", ["Synthetic", "Dataset5_x", "Dataset501"])
def test_a_folder_that_nnunet_would_not_find_is_refused(datalist, tmp_path, name):
    with pytest.raises(ValueError, match="nnU-Net wants a folder DatasetNNN_Name"):
        export(datalist, tmp_path / name)
    assert not (tmp_path / name).exists()


def test_another_section_or_none(datalist, tmp_path):
    with pytest.raises(ValueError, match="no case in section 'test'"):
        export(datalist, tmp_path / "Dataset502_x", section="test")


@pytest.mark.slow
@pytest.mark.skipif(
    "NNUNET_PYTHON" not in os.environ, reason="NNUNET_PYTHON names a Python with nnunetv2, see CONTRIBUTING"
)
def test_nnunet_itself_finds_nothing_amiss(datalist, tmp_path):
    root = tmp_path / "raw/Dataset501_Synthetic"
    export(datalist, root)
    code = (
        "import sys; from nnunetv2.experiment_planning import verify_dataset_integrity as module; "
        "module.verify_dataset_integrity(sys.argv[1], 1)"
    )
    places = {"nnUNet_raw": str(root.parent), "nnUNet_preprocessed": str(tmp_path), "nnUNet_results": str(tmp_path)}
    command = [os.environ["NNUNET_PYTHON"], "-c", code, str(root)]
    done = subprocess.run(command, env={**os.environ, **places, "PYTHONPATH": ""}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "verify_dataset_integrity Done" in done.stdout

"""Bad input of the bundle: an error that names the file and the rule, and nothing half-written.

Real files go through the transforms of the configs; the rules themselves are tested in tests/volumes/test_reading.py.
"""

import contextlib
import gzip
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from custom.diffusion.sampler import windows_of
from custom.runs.files import part_of
from custom.volumes.anatomy import Anatomy
from helpers import CONFIGS, TINY
from monai.bundle import ConfigParser

SPACING_MM = 1.5
NOMINAL_HU = Anatomy(json.loads((CONFIGS / "inference.json").read_text())["anatomy"]).nominal_hu
PAINTED_HU = {0: -60, 1: 105 + 30, 3: 400 + 20, 5: 350 + 100}  # median shift from the nominal: +30
ROLES = {  # what a bad file replaces
    "inference": {"image": "template_image", "label": "label"},
    "train": {"image": "image", "label": "label"},
}


def anatomy():
    """A heart of three labels in a field of view of odd sizes."""
    label = np.zeros((21, 19, 20), np.uint8)
    label[4:16, 4:15, 4:16] = 1
    label[6:10, 6:13, 6:14] = 3
    label[10:14, 6:13, 6:14] = 5
    return label


def scan(label):
    """Constant HU in every label, and air along one side."""
    image = np.vectorize(PAINTED_HU.get)(label).astype(np.int16)
    image[:, :2] = -1000
    return image


def write(path, values, spacing_mm=(SPACING_MM,) * 3, shift_mm=0.0):
    affine = np.diag([*spacing_mm, 1.0])
    affine[0, 3] = shift_mm
    nib.save(nib.Nifti1Image(values, affine), path)
    return str(path)


@contextlib.contextmanager
def refused(*texts):
    """One message of the chain of errors, which the user sees whole, holds all the texts: the file and the rule."""
    with pytest.raises(Exception) as caught:  # noqa: PT011
        yield
    chain, error = [], caught.value
    while error is not None:
        chain.append(str(error))
        error = error.__cause__
    assert any(all(str(text) in message for text in texts) for message in chain), chain


@pytest.fixture
def files(tmp_path):
    label = anatomy()
    return {"label": write(tmp_path / "label.nii.gz", label), "image": write(tmp_path / "image.nii.gz", scan(label))}


def parsed(config, section, **overrides):
    parser = ConfigParser(ConfigParser.load_config_file(CONFIGS / config))
    parser.update({"bundle_root": str(CONFIGS.parent), "device": "cpu", **overrides})
    return parser.get_parsed_content(section)


@pytest.fixture(scope="module")
def pipelines():
    return {
        "inference": parsed("inference.json", "preprocessing"),
        "train": parsed("train.json", "train#preprocessing", roi_size=[16, 16, 16], roi_margin=2),
    }


def run(pipelines, config, files, **bad):
    """Preprocess one case of which some files, by role, are replaced."""
    item = {"label": files["label"], "case": "case", "weight": 1.0}
    item |= (
        {"template_image": files["image"], "template_label": files["label"]}
        if config == "inference"
        else {"image": files["image"]}
    )
    return pipelines[config](item | {ROLES[config].get(role, role): str(path) for role, path in bad.items()})


def relabelled(old, new, dtype=np.int16):
    label = anatomy().astype(dtype)
    label[label == old] = new
    return label


def with_voxel(values, bad, dtype=np.float32):
    values = values.astype(dtype)
    values[8, 8, 8] = bad
    return values


def colours():
    return np.zeros(anatomy().shape, dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])


@pytest.mark.parametrize("config", ROLES)
def test_good_files_pass(pipelines, files, config):
    """So that every refusal below is due to the one file that was replaced."""
    result = run(pipelines, config, files)
    result = result[0] if isinstance(result, list) else result
    assert bool(result["context"].isfinite().all())
    assert result["context"].shape == (4, *((21, 19, 20) if config == "inference" else (16, 16, 16)))


BAD_VOLUMES = {
    "unknown id": ("label", relabelled(3, 42), "label ids [42] are not in the label map 0 to 10"),
    "negative id": ("label", relabelled(3, -1), "label ids [-1] are not in the label map 0 to 10"),
    "id between": ("label", with_voxel(anatomy(), 2.5), "label ids must be integers, got [2.5]"),
    "empty mask": ("label", np.zeros_like(anatomy()), "the mask is empty"),
    "mask of dropped ids": ("label", (anatomy() > 0).astype(np.uint8) * 12, "the mask is empty"),
    "NaN in mask": ("label", with_voxel(anatomy(), np.nan), "NaN or infinite"),
    "infinity in mask": ("label", with_voxel(anatomy(), np.inf), "NaN or infinite"),
    "4D mask": ("label", np.stack([anatomy()] * 2, -1), "one 3D volume of one channel, got channels and size (2,"),
    "2D mask": ("label", anatomy()[8], "one 3D volume of one channel"),
    "NaN": ("image", with_voxel(scan(anatomy()), np.nan), "NaN or infinite"),
    "infinity": ("image", with_voxel(scan(anatomy()), -np.inf), "NaN or infinite"),
    "constant": ("image", np.full_like(scan(anatomy()), 40), "every voxel is 40; a constant image"),
    "8-bit": (
        "image",
        ((scan(anatomy()) + 1000) * (255 / 1450)).astype(np.uint8),
        "values 0 to 255 are not Hounsfield units",
    ),
    "unsigned": ("image", (scan(anatomy()) + 1000).astype(np.uint16), "values 0 to 1450 are not Hounsfield units"),
    "normalised": ("image", scan(anatomy()) / np.float32(1000), "are not Hounsfield units"),
    "scaled twice": ("image", scan(anatomy()).astype(np.float32) * 100, "-100000 to 45000 are not Hounsfield units"),
    "4D": ("image", np.stack([scan(anatomy())] * 3, -1), "one 3D volume of one channel, got channels and size (3,"),
}


@pytest.mark.parametrize("config", ROLES)
@pytest.mark.parametrize("name", BAD_VOLUMES)
def test_bad_volume_is_refused_by_file_and_rule(pipelines, files, tmp_path, config, name):
    role, values, rule = BAD_VOLUMES[name]
    bad = write(tmp_path / "bad.nii.gz", values)
    with refused(f"{bad}: ", rule):
        run(pipelines, config, files, **{role: bad})


@pytest.mark.parametrize("config", ROLES)
@pytest.mark.parametrize("role", ["image", "label"])
@pytest.mark.parametrize(
    ("spacing_mm", "rule"),
    [
        ((1.5, 1.5, 6.0), "spacing [1.5, 1.5, 6.0] mm is 4.0 times the model's [1.5, 1.5, 1.5] mm"),
        ((0.0015, 0.0015, 0.0015), "fewer than 2 of the model's [1.5, 1.5, 1.5] mm along an axis"),
    ],
    ids=["thick slices", "header in metres"],
)
def test_spacing_far_from_the_training_spacing_is_refused(pipelines, files, tmp_path, config, role, spacing_mm, rule):
    values = anatomy() if role == "label" else scan(anatomy())
    bad = write(tmp_path / "bad.nii.gz", values, spacing_mm)
    with refused(f"{bad}: ", rule):
        run(pipelines, config, files, **{role: bad})


@pytest.mark.parametrize("config", ROLES)
def test_image_and_mask_of_different_size_are_refused_with_both_names(pipelines, files, tmp_path, config):
    label = files["label"]
    bad = write(tmp_path / "bad.nii.gz", scan(anatomy())[:-1])
    with refused(bad, label, "must share one grid, got sizes (20, 19, 20) and (21, 19, 20)"):
        run(pipelines, config, files, image=bad)


@pytest.mark.parametrize("config", ROLES)
def test_image_and_mask_at_different_places_are_refused_with_both_names(pipelines, files, tmp_path, config):
    label = files["label"]
    bad = write(tmp_path / "bad.nii.gz", scan(anatomy()), shift_mm=4.0)
    with refused(bad, label, "must share one grid", "affines that put a corner 4 mm apart"):
        run(pipelines, config, files, image=bad)


def test_target_mask_need_not_share_the_grid_of_the_template(pipelines, files, tmp_path):
    target = write(tmp_path / "target.nii.gz", anatomy()[1:], shift_mm=50.0)
    assert run(pipelines, "inference", files, label=target)["context"].shape == (4, 20, 19, 20)


BAD_FILES = {
    "garbage": (lambda content: b"no nifti" * 40, "is not a gzip file"),
    "garbage in gzip": (lambda content: gzip.compress(b"no nifti" * 400), "Cannot work out file type"),
    "empty file": (lambda content: b"", "Empty file"),
    "stream cut short": (lambda content: content[: len(content) // 2], "end-of-stream"),
    "volume cut short": (lambda content: gzip.compress(gzip.decompress(content)[:3000]), "Expected"),
    "colours": (
        lambda content: gzip.compress(nib.Nifti1Image(colours(), np.eye(4)).to_bytes()),
        "Cannot cast array data",
    ),
}


@pytest.mark.parametrize("config", ROLES)
@pytest.mark.parametrize("role", ["image", "label"])
@pytest.mark.parametrize(("spoil", "rule"), BAD_FILES.values(), ids=BAD_FILES)
def test_unreadable_file_is_named(pipelines, files, tmp_path, config, role, spoil, rule):
    noise = np.random.default_rng(0).integers(0, 9, (21, 19, 20), dtype=np.int16)  # a stream long enough to cut
    bad = tmp_path / "bad.nii.gz"
    bad.write_bytes(spoil(Path(write(tmp_path / "whole.nii.gz", noise)).read_bytes()))
    with refused(bad, rule):
        run(pipelines, config, files, **{role: bad})


@pytest.mark.parametrize("config", ROLES)
@pytest.mark.parametrize("role", ["image", "label"])
def test_file_that_vanished_is_named(pipelines, files, tmp_path, config, role):
    with refused(tmp_path / "gone.nii.gz", "No such file"):
        run(pipelines, config, files, **{role: tmp_path / "gone.nii.gz"})


def test_missing_files_are_named_before_any_is_rendered(files, tmp_path):
    gone = [str(tmp_path / "gone_mask.nii.gz"), str(tmp_path / "gone_template.nii.gz")]
    templates = [{"image": gone[1], "label": files["label"]}]
    with refused("2 listed files do not exist", *gone):
        parsed("inference.json", "data", target_masks=[files["label"], gone[0]], templates=templates)


def test_missing_files_of_all_sections_are_named_before_training(files, tmp_path):
    lists = {
        section: [{"image": f"gone_{section}.nii.gz", "label": files["label"]}]
        for section in ("training", "validation")
    }
    (tmp_path / "datalist.json").write_text(json.dumps(lists))
    with refused("2 listed files do not exist", "gone_training.nii.gz", "gone_validation.nii.gz"):
        parsed("train.json", "files", dataset_dir=str(tmp_path))


def test_folder_without_masks_is_refused_with_the_knob_to_turn(tmp_path):
    with refused("no target label map found; set `target_masks`"):
        parsed("inference.json", "data", dataset_dir=str(tmp_path))


def test_label_the_template_lacks_is_painted_at_its_shifted_nominal_hu_and_warned_about(
    pipelines, files, tmp_path, caplog
):
    label = anatomy()
    label[8:12, 8:11, 8:12] = 8
    target = write(tmp_path / "target.nii.gz", label)
    result = run(pipelines, "inference", files, label=target)
    prior, painted = result["prior"][0].numpy(), {**PAINTED_HU, 8: NOMINAL_HU[8] + 30}
    for index in (1, 3, 5, 8):
        np.testing.assert_allclose(prior[label == index], painted[index], atol=0.01)
    warnings = [record.getMessage() for record in caplog.records if record.name == "custom.diffusion.transforms"]
    assert len(warnings) == 1
    assert warnings[0].startswith(f"{target}: the template shows no label [8]; painted at its nominal HU, shifted")


def test_template_with_all_labels_warns_of_nothing(pipelines, files, caplog):
    run(pipelines, "inference", files)
    assert [record for record in caplog.records if record.name == "custom.diffusion.transforms"] == []


def test_template_that_shares_no_label_is_refused_with_both_names(pipelines, files, tmp_path):
    target = write(tmp_path / "target.nii.gz", (anatomy() == 3).astype(np.uint8) * 6)
    with refused(target, files["label"], "share none of the labels"):
        run(pipelines, "inference", files, label=target)


def test_mask_of_few_slices_is_prepared_like_any(pipelines, files, tmp_path):
    target = write(tmp_path / "target.nii.gz", anatomy()[:, :, 8:12])
    assert run(pipelines, "inference", files, label=target)["context"].shape == (4, 21, 19, 4)


def test_roi_larger_than_the_volume_is_refused_with_both_sizes(files):
    training = {"train": parsed("train.json", "train#preprocessing", roi_size=[16, 20, 16], roi_margin=2)}
    with refused(files["label"], "voxels at the model's spacing are fewer than the ROI (16, 20, 16); lower `roi_size`"):
        run(training, "train", files)


def test_window_larger_than_the_volume_is_shrunk_to_it():
    inferer = parsed("inference.json", "inferer")
    (window,) = windows_of((21, 19, 20), inferer.roi_size, inferer.overlap)
    assert [part.stop - part.start for part in window] == [21, 19, 20]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    directory = tmp_path_factory.mktemp("weights")
    torch.save(parsed("inference.json", "network_def", **TINY).state_dict(), directory / "model.pt")
    return directory


def load_weights(directory, **overrides):
    handler = parsed("inference.json", "handlers#0", ckpt_dir=str(directory), **TINY, **overrides)
    handler(None)


def test_missing_weights_are_refused_with_the_knob_to_turn(tmp_path):
    with refused(tmp_path / "model.pt", "no weights; train first, or point `ckpt_dir`"):
        load_weights(tmp_path)


@pytest.mark.parametrize(
    "other", [{"network_def#channels": [8, 16]}, {"network_def#num_labels": 5}], ids=["wider", "fewer labels"]
)
def test_weights_of_another_network_are_refused(weights, other):
    load_weights(weights)
    handler = parsed("inference.json", "handlers#0", ckpt_dir=str(weights), **{**TINY, **other})
    with refused(weights / "model.pt", "these are not weights of the configured network", "use the `network_def`"):
        handler(None)


@pytest.mark.parametrize(
    "spoil",
    [lambda content: content[: len(content) // 2], lambda content: b"garbage" * 10, lambda content: b""],
    ids=["cut short", "garbage", "empty"],
)
def test_unreadable_weights_are_named(weights, tmp_path, spoil):
    (tmp_path / "model.pt").write_bytes(spoil((weights / "model.pt").read_bytes()))
    with refused(tmp_path / "model.pt", "not weights"):
        load_weights(tmp_path)


@pytest.fixture
def render(workflow, files, weights, tmp_path):
    """Render masks by the whole of inference.json into `tmp_path/out`."""

    def start(*masks):
        engine = workflow(
            "inference.json",
            workflow_type="infer",
            target_masks=[str(mask) for mask in masks],
            templates=[files],
            output_dir=str(tmp_path / "out"),
            ckpt_dir=str(weights),
            device="cpu",
            sampling_steps=1,
            **{**TINY, "spacing_mm": [SPACING_MM] * 3},
        )
        engine.run()

    return start


def written(folder):
    """Files of a folder but for what a run says of itself: who is at work, with which options."""
    own = {".shard_0.lock", "rendering.json"}
    return sorted(path.name for path in folder.iterdir() if path.is_file() and path.name not in own)


def test_bad_mask_among_good_ones_leaves_the_complete_results_and_no_part_of_its_own(render, tmp_path):
    masks = [write(tmp_path / f"{name}.nii.gz", anatomy()) for name in ("first", "last")]
    bad = write(tmp_path / "bad.nii.gz", relabelled(3, 42))
    with refused(f"{bad}: ", "label ids [42] are not in the label map"):
        render(masks[0], bad, masks[1])
    assert written(tmp_path / "out") == ["first_from_image.nii.gz"]
    assert np.asarray(nib.load(tmp_path / "out/first_from_image.nii.gz").dataobj).shape == (21, 19, 20)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_full_disk_is_named_and_leaves_no_part_of_the_result(render, files, tmp_path):
    (tmp_path / "out").mkdir()
    part_of(tmp_path / "out/label_from_image.nii.gz").symlink_to("/dev/full")
    with refused(tmp_path / "out/label_from_image.nii.gz", "No space left on device; nothing was written"):
        render(files["label"])
    assert written(tmp_path / "out") == []

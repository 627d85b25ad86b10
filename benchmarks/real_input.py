"""A real anatomy in the appearance of a real CTA: how near is the rendering to its template?

    bash ci/real_input.sh ../shared/data runs/real_input

or, of any weights,

    python benchmarks/real_input.py --data_dir ../shared/data --ckpt_dir MODELS --work_dir runs/real_input

Targets: the Visible Human heart, if it is there, and the CTA's own mask deformed. There is no true image of either, so
everything is measured against the template: label means, vessel contrast, grain, and the step across the outline of its
own heart.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import fire
import nibabel as nib
import numpy as np
import torch
from common import PICTURES, RESULTS, machine, trained_renderer
from custom.evaluation.rendering import texture_correlation
from custom.geometry.deformation import exponentiate, identity_coordinates, random_velocity, sample_labels
from custom.runs.files import write_json
from custom.volumes.intensity import label_statistics, noise_sd
from custom.volumes.pictures import save_sheet
from monai.transforms import Compose
from scipy import ndimage

CUBE = np.ones((3, 3, 3), dtype=bool)
SPACING_MM = [1.5, 1.5, 1.5]
LABELS, VESSEL, CHAMBERS = list(range(1, 8)), 9, [2, 3, 4, 5]


def deformed_mask(source: Path, path: Path, seed: int = 3) -> Path:
    """Write a label map deformed by a smooth random diffeomorphism (8 mm RMS, 30 mm long)."""
    image = nib.load(source)
    label = torch.from_numpy(np.asarray(image.dataobj).astype(np.int64))[None, None]
    velocity = random_velocity(
        label.shape[2:],
        spacing_mm=[float(z) for z in image.header.get_zooms()],
        sigma_mm=30.0,
        amplitude_mm=8.0,
        generator=torch.Generator().manual_seed(seed),
    )
    warped = sample_labels(label, identity_coordinates(label.shape[2:]) + exponentiate(velocity))
    nib.save(nib.Nifti1Image(warped[0, 0].numpy().astype(np.uint8), image.affine), path)
    return path


def contrast(image: np.ndarray, label: np.ndarray) -> float:
    """Mean of the coronaries over unlabelled soft tissue 2 to 3 voxels away, in HU."""
    vessel = label == VESSEL
    near = ndimage.binary_dilation(vessel, CUBE)
    around = ndimage.binary_dilation(near, CUBE, iterations=2) & ~near & (label == 0) & (image > -300)
    return float(image[vessel].mean() - image[around].mean())


def ghost_step(image: np.ndarray, label: np.ndarray, template_label: np.ndarray) -> tuple[float, int]:
    """Step in HU across the aligned template heart's outline where the target has background.

    Voxels up to two inside the outline, against the mean of those one to three voxels outside it in the 7^3 voxels
    around them: means over the whole outline would compare different organs. Unlabelled blood and lung are left out.

    Returns:
        mean step and the voxels it is taken over; NaN and 0 if nowhere.
    """
    soft = (image > -300) & (image < 150)
    background = soft & ~ndimage.binary_dilation(label > 0, CUBE, iterations=2)
    heart = template_label > 0
    inside = heart & ~ndimage.binary_erosion(heart, CUBE, iterations=2) & background
    outside = ndimage.binary_dilation(heart, CUBE, iterations=3) & ~ndimage.binary_dilation(heart, CUBE) & background
    share = ndimage.uniform_filter(outside.astype(float), 7)
    compared = inside & (share > 3 / 7**3)
    if not compared.any():
        return float("nan"), 0
    around = ndimage.uniform_filter(np.where(outside, image, 0).astype(float), 7)
    step = image[compared] - around[compared] / share[compared]
    return float(step.mean()), int(compared.sum())


def measure(image: np.ndarray, item: dict, template: np.ndarray, template_label: np.ndarray) -> dict:
    """All figures of one rendering on the model's grid, against the unaligned scan of the template."""
    label = item["label"][0].numpy().round().astype(np.int64)
    means = label_statistics(torch.from_numpy(image), torch.from_numpy(label), 11)[:, 0]
    reference = item["statistics"][:, 0]
    inside, template_inside = (
        ndimage.binary_erosion(np.isin(volume, CHAMBERS), CUBE) for volume in (label, template_label)
    )
    step, step_voxels = ghost_step(image, label, item["template_label"][0].numpy())
    prior_step, _ = ghost_step(item["prior"][0].numpy(), label, item["template_label"][0].numpy())
    return {
        "label_error_hu": {str(i): float(means[i] - reference[i]) for i in LABELS},
        "coronary_mean_hu": float(means[VESSEL]),
        "coronary_contrast_hu": contrast(image, label),
        "coronary_contrast_of_template_hu": contrast(template, template_label),
        "noise_ratio": noise_sd(image, inside) / noise_sd(template, template_inside),
        "ghost_step_hu": step,
        "ghost_step_voxels": step_voxels,
        "ghost_step_of_the_prior_hu": prior_step,
        "template_texture_correlation": texture_correlation(
            image, item["template_image"][0].numpy(), (label == 0) & (image > -300)
        ),
    }


def renderings(
    ckpt_dir: str, masks: Sequence[Path], pair: Mapping[str, str], **options: Any
) -> Iterator[tuple[str, np.ndarray, dict]]:
    """Name, image with grain (H, W, D) HU and all else of every mask in the template, on the model's grid."""
    targets = [str(mask) for mask in masks if mask.exists()]
    parser = trained_renderer(ckpt_dir, target_masks=targets, templates=[pair], **options)
    network, inferer, finish = (parser.get_parsed_content(name) for name in ("network_def", "inferer", "finish"))
    preprocessing = parser.get_parsed_content("preprocessing")
    for case in parser.get_parsed_content("cases"):
        item = preprocessing(case)
        structure = inferer(item["context"][None], network, [case["case"]])[0]
        yield case["case"], finish({**item, "pred": structure})["pred"][0].numpy(), item


def main(data_dir: str, ckpt_dir: str, work_dir: str) -> None:
    """Render both targets, measure them at the CTA's own 1.5 mm; write benchmarks/results/real_input.json.

    The picture beside it shows the Visible Human from its mask of 0.6 mm, so at the model's finest spacing.
    """
    data, work = Path(data_dir), Path(work_dir)
    work.mkdir(parents=True, exist_ok=True)
    pair = {"image": str(data / "real_cta/image.nii.gz"), "label": str(data / "real_cta/label_derived.nii.gz")}
    deformed = deformed_mask(Path(pair["label"]), work / "cta_deformed.nii.gz")
    human = data / "visible_human_heart_F"
    at_1_5 = {"spacing_mm": SPACING_MM}
    # Its own mask, so that the template comes as it was scanned.
    read = trained_renderer(ckpt_dir, **at_1_5).get_parsed_content("read")
    template = Compose(read)(
        {"label": pair["label"], "case": "itself", "template_image": pair["image"], "template_label": pair["label"]}
    )
    template_image = template["template_image"][0].numpy()
    template_label = template["label"][0].numpy().round().astype(np.int64)
    results = {}
    for name, image, item in renderings(ckpt_dir, [human / "label_1mm.nii.gz", deformed], pair, **at_1_5):
        results[name] = measure(image, item, template_image, template_label)
        print(name, results[name])
    fine = renderings(ckpt_dir, [human / "label_0p6mm.nii.gz", deformed], pair)
    rows = [(name, image, item["label"][0].numpy()) for name, image, item in fine]
    save_sheet(PICTURES / "real_input.png", rows, vessel_labels=[VESSEL])
    write_json(RESULTS / "real_input.json", {"machine": machine(), "cases": results})


if __name__ == "__main__":
    fire.Fire(main)

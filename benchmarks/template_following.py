"""Does a rendering follow its template in intensity and its mask in anatomy? Held-out phantoms, trained weights.

    python benchmarks/template_following.py --ckpt_dir bundles/structdiff_cardiac/models

Intensity: one mask with many templates; correlation, over the templates, of label means in rendering and template.
Anatomy: one template and one noise with several masks; how well contrast-filled blood, found by a threshold, overlaps
the mask that was asked for, and the mask of the template.
"""

from __future__ import annotations

from typing import Any

import fire
import numpy as np
import torch
from common import PICTURES, RESULTS, machine, template_chain, trained_renderer
from custom.diffusion.transforms import PaintPriord
from custom.phantom.cohort import make_subject
from custom.runs.files import write_json
from custom.volumes.intensity import label_statistics
from custom.volumes.pictures import save_sheet

LABELS = [1, 2, 3, 4, 5, 6, 7]
BLOOD, MUSCLE, VESSEL = [2, 3, 4, 5, 6, 7, 8, 10], 1, 9
TEST_SEED = 30_000  # far from the seeds of any training cohort
SHAPE, SPACING_MM = (96, 96, 96), 1.5


def subject(index: int) -> tuple[np.ndarray, np.ndarray]:
    """Image in HU and label map of a held-out phantom."""
    made = make_subject(TEST_SEED, index, shape=SHAPE, spacing_mm=SPACING_MM)
    return made.image.astype(np.float32), made.label.astype(np.int64)


def means(image: np.ndarray, label: np.ndarray) -> np.ndarray:
    """Mean HU of LABELS."""
    return label_statistics(torch.from_numpy(image), torch.from_numpy(label), 11)[LABELS, 0].numpy()


def blood_dice(image: np.ndarray, label: np.ndarray, statistics: np.ndarray) -> float:
    """Dice of blood found in the image, half-way between template blood and muscle, and in a mask, on its heart."""
    blood = np.isin(label, BLOOD)
    threshold = (np.mean([statistics[i - 1] for i in (2, 3, 6)]) + statistics[MUSCLE - 1]) / 2
    heart = blood | (label == MUSCLE)
    found = (image > threshold) & heart
    return float(2 * (found & blood).sum() / (found.sum() + blood.sum()))


def main(ckpt_dir: str, templates: int = 8, masks: int = 4) -> None:
    """Render, measure, draw; write template_following .json to benchmarks/results and .png to docs/pictures."""
    parser = trained_renderer(ckpt_dir)
    network, inferer, finish = (parser.get_parsed_content(name) for name in ("network_def", "inferer", "finish"))
    guide = template_chain(LABELS)
    paint = PaintPriord(nominal_hu=parser.get_parsed_content("labels").nominal_hu, thin_labels=[VESSEL])

    def render(label: np.ndarray, image: np.ndarray, own: np.ndarray) -> np.ndarray:
        volumes = {"label": label, "template_image": image, "template_label": own}
        item: dict[str, Any] = {k: torch.from_numpy(v.astype(np.float32))[None] for k, v in volumes.items()}
        item = paint(guide({**item, "case": "template_following"}))  # type: ignore[assignment]
        item["pred"] = inferer(item["context"][None], network, [item["case"]])[0]
        return finish(item)["pred"][0].numpy()

    subjects = [subject(index) for index in range(templates)]
    _, target = subject(1000)
    rendered = [render(target, *pair) for pair in subjects]
    asked = np.stack([means(*pair) for pair in subjects])
    given = np.stack([means(image, target) for image in rendered])
    correlation = {str(n): float(np.corrcoef(asked[:, i], given[:, i])[0, 1]) for i, n in enumerate(LABELS)}
    anatomy = []
    for index in range(masks):
        label = target if index == 0 else subject(1000 + index)[1]
        image = rendered[0] if index == 0 else render(label, *subjects[0])
        own, other = (blood_dice(image, mask, asked[0]) for mask in (label, subjects[0][1]))
        anatomy.append({"dice_with_its_mask": own, "dice_with_the_mask_of_the_template": other})
    result = {
        "machine": machine(),
        "templates": templates,
        "correlation_by_label": correlation,
        "correlation_all_labels": float(np.corrcoef(asked.ravel(), given.ravel())[0, 1]),
        "mean_absolute_error_hu": float(np.abs(asked - given).mean()),
        "template_means_hu": asked.round(1).tolist(),
        "rendered_means_hu": given.round(1).tolist(),
        "anatomy": anatomy,
    }
    write_json(RESULTS / "template_following.json", result)
    rows = [(f"template {i}", subjects[i][0], subjects[i][1]) for i in range(3)]
    rows += [(f"one mask, template {i}", rendered[i], target) for i in range(3)]
    save_sheet(PICTURES / "template_following.png", rows, vessel_labels=[VESSEL])
    for key in ("correlation_by_label", "correlation_all_labels", "mean_absolute_error_hu", "anatomy"):
        print(key, result[key])


if __name__ == "__main__":
    fire.Fire(main)

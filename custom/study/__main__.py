"""Command line of a study of one's own cases: `python -m custom.study run --datalist cases --output_dir runs/five`."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fire
from custom.runs.command_line import check_flags
from custom.runs.files import make_folder
from custom.study.bundles import find_bundles
from custom.study.cases import SECTIONS, cases_in, divided, is_folder, listed_cases, write_datalist
from custom.study.checking import check_cases
from custom.study.folds import summarise, write_folds
from custom.study.planning import plan
from custom.study.running import run_stages, say_plan
from custom.study.serving import serve as serve_segmenter
from custom.study.stages import Settings, Study
from custom.synthesis.nnunet import export_nnunet

logger = logging.getLogger("study")


def check(datalist: str, bundles: str | None = None, overrides: str | None = None, out: str | None = None) -> None:
    """Look at all cases: what they are, what would be refused and what to do about it. Trains nothing.

    Exits with 1 when a case would be refused.

    Args:
        datalist: JSON with "training", "validation" and "test", or a folder with images/NAME.nii.gz and
            labels/NAME.nii.gz.
        bundles: folder with both bundles, where they do not lie beside this package.
        overrides: JSON file with options of the bundles: "anatomy", "label_mapping".
        out: JSON file to write as well.
    """
    labels, mapping = find_bundles(bundles, overrides).labels()
    if any(case.refused for case in check_cases(str(datalist), labels, mapping, out)):
        sys.exit(1)


def _by_section(datalist: Path) -> dict[str, list[dict[str, Any]]]:
    """Cases of a list by section.

    Raises:
        ValueError: where a section has none.
    """
    cases = listed_cases(str(datalist))
    found = {section: [case for case in cases if case["section"] == section] for section in SECTIONS}
    if absent := [section for section in SECTIONS if not found[section]]:
        raise ValueError(
            f"{datalist}: needs a case of each section, got none of {absent}: cases to learn from, one that chooses "
            "weights, and one to measure on; with fewer follow docs/FIVE_CASES.md step by step"
        )
    return found


def _run_or_say(study: Study, dry_run: bool) -> None:
    stages = plan(study)
    if dry_run:
        say_plan(stages, stages)
    else:
        run_stages(stages, study.root, *study.inputs())


def run(
    datalist: str,
    output_dir: str,
    count: int = 30,
    epochs: int = 150,
    finetune: int = 0,
    workers: int = 2,
    seed: int = 0,
    spacing_mm: float = 0.8,
    mode: str = "template",
    pretrained: bool = True,
    bundles: str | None = None,
    overrides: str | None = None,
    dry_run: bool = False,
) -> None:
    """New label maps, images of them with confidence, a segmenter with and without them, and one report.

    Started again with the same options it goes on where it stopped; what is done is kept.

    Args:
        datalist: JSON with "training", "validation" and "test", or a folder with images/NAME.nii.gz and
            labels/NAME.nii.gz, of which the last tests and the one before chooses weights.
        output_dir: folder of all results.
        count: new label maps, each with an image.
        epochs: of the segmenter of real cases alone; the other gets as many, two thirds of them before.
        finetune: epochs for which the generator is trained on with the cases; 0 takes it as it comes.
        workers: processes that make label maps.
        seed: of all stages.
        spacing_mm: voxel size of new label maps and their images; 1.5 is twice as fast, and blurs coronaries.
        mode: "template", images by the network, or "painted", in drawn HU without one.
        pretrained: segmenters start from the shipped weights, which have seen no patient, rather than from nothing.
        bundles: folder with both bundles, where they do not lie beside this package.
        overrides: JSON file with options that every run of a bundle gets last.
        dry_run: only say what would be run.
    """
    root = Path(output_dir).expanduser().resolve()
    settings = Settings(count, epochs, finetune, workers, seed, spacing_mm, mode, pretrained)
    found = find_bundles(bundles, overrides)
    if is_folder(datalist):
        listed, in_folder = root / "datalist.json", cases_in(datalist)
        if not dry_run:
            make_folder(str(root))
            write_datalist(in_folder, listed)
        study = Study(found, listed, root, settings, divided(in_folder))
    else:
        listed = Path(datalist).expanduser().resolve()
        study = Study(found, listed, root, settings, _by_section(listed))
    _run_or_say(study, dry_run)
    if not dry_run:
        logger.info("report: %s", root / "synthetic/report.html")
        logger.info("segmenter: %s; `serve` puts it into MONAI Label", root / "cal/models/model.pt")


def cross_validate(
    datalist: str,
    output_dir: str,
    folds: int = 5,
    count: int = 30,
    epochs: int = 150,
    finetune: int = 0,
    workers: int = 2,
    seed: int = 0,
    spacing_mm: float = 0.8,
    mode: str = "template",
    pretrained: bool = True,
    bundles: str | None = None,
    overrides: str | None = None,
    dry_run: bool = False,
) -> None:
    """Run a study for each fold, all of it from the fold's own cases, and compare both segmenters over all cases.

    Args:
        datalist: as of `run`; which section a case is in does not count.
        output_dir: folder of all results.
        folds: 2 to the number of cases.
        count, epochs, finetune, workers, seed, spacing_mm, mode, pretrained, bundles, overrides, dry_run: as of `run`,
            for each fold.
    """
    root = Path(output_dir).expanduser().resolve()
    settings = Settings(count, epochs, finetune, workers, seed, spacing_mm, mode, pretrained)
    cases = cases_in(datalist) if is_folder(datalist) else listed_cases(str(Path(datalist).expanduser().resolve()))
    lists = write_folds(cases, root, folds)
    for number, listed in enumerate(lists, start=1):
        logger.info("fold %d of %d: %s", number, len(lists), listed.parent)
        found = find_bundles(bundles, overrides)
        _run_or_say(Study(found, listed, listed.parent, settings, _by_section(listed)), dry_run)
    if not dry_run:
        logger.info("\n%s", summarise([listed.parent for listed in lists], root))
        logger.info("by label: %s", root / "cross_validation_labels.csv")


def serve(
    output_dir: str,
    studies: str,
    python: str = sys.executable,
    weights: str | None = None,
    port: int = 8000,
    bundles: str | None = None,
) -> None:
    """Serve the segmenter of a study in MONAI Label, on 127.0.0.1.

    Args:
        output_dir: folder of the study; the app is made in its `monailabel`.
        studies: folder of images to be segmented and corrected.
        python: interpreter with MONAI Label.
        weights: of the segmenter; None takes those of the study.
        port: of the server.
        bundles: folder with both bundles, where they do not lie beside this package.
    """
    root = Path(output_dir).expanduser().resolve()
    own = Path(weights).expanduser().resolve() if weights else root / "cal/models/model.pt"
    serve_segmenter(find_bundles(bundles), own, studies, python=python, app_dir=root / "monailabel", port=port)


def export(
    datalist: str, export_dir: str, section: str = "training", bundles: str | None = None, overrides: str | None = None
) -> None:
    """Write a synthetic set, or real cases, as a raw data set of nnU-Net v2, with confidence maps beside.

    Args:
        datalist: of the set, `synthetic/datalist.json` of a study.
        export_dir: folder `DatasetNNN_Name`, as nnU-Net wants it.
        section: of the list.
        bundles, overrides: as of `run`.
    """
    labels, mapping = find_bundles(bundles, overrides).labels()
    number = export_nnunet(str(datalist), export_dir, labels=labels, label_mapping=mapping, section=section)
    logger.info("%d cases: %s", number, export_dir)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    commands: dict[str, Callable] = {
        "check": check,
        "run": run,
        "cross_validate": cross_validate,
        "serve": serve,
        "export": export,
    }
    try:
        check_flags(commands)
        fire.Fire(commands)
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        sys.exit(f"ERROR: {error}")

"""The segmenter of a study in MONAI Label, on this machine only."""

from __future__ import annotations

import logging
import shutil
import subprocess
from pathlib import Path

from custom.study.bundles import ROOT, SEGMENTER, Bundles, environment

logger = logging.getLogger(__name__)
_APP = "monaibundle"


def serve(bundles: Bundles, weights: Path, studies: str, *, python: str, app_dir: Path, port: int) -> None:
    """Put the bundle with these weights into MONAI Label's bundle app and start the server on 127.0.0.1.

    A model that was served before from `app_dir`, and may have been trained on there, is kept as it is.

    Args:
        bundles: the segmenter of which is served.
        weights: `model.pt`.
        studies: folder of images to be segmented and corrected.
        python: interpreter with MONAI Label.
        app_dir: folder of the app; made where it is not there.
        port: of the server.

    Raises:
        FileNotFoundError: naming what is missing and how to get it.
        RuntimeError: when MONAI Label ends with an error.
    """
    if (
        shutil.which(python) is None
        or subprocess.run([python, "-c", "import monailabel"], capture_output=True).returncode
    ):
        raise FileNotFoundError(
            f"python: MONAI Label is not installed in {python}; in a clone `bash ci/monailabel.sh` installs and checks "
            "it, then --python .venv-monailabel/bin/python; it needs an environment of its own"
        )
    if not Path(studies).is_dir():
        raise FileNotFoundError(f"studies: {studies} is no folder; name the one with your images in HU")
    if not weights.is_file():
        raise FileNotFoundError(f"{weights}: there are no weights; run the study first, or name them by --weights")
    app = app_dir / _APP
    run = environment()
    run.pop("PYTHONPATH")  # the bundle's own package is used
    if not app.is_dir():
        _call([python, "-m", "monailabel.main", "apps", "--download", "--name", _APP, "--output", str(app_dir)], run)
    model = app / "model" / SEGMENTER
    if not model.is_dir():
        part = model.with_name(f".{SEGMENTER}")
        shutil.rmtree(part, ignore_errors=True)
        shutil.copytree(bundles.segmenter, part, ignore=shutil.ignore_patterns("eval", "__pycache__"))
        shutil.copytree(ROOT / "custom", part / "custom", dirs_exist_ok=True)
        shutil.copy(weights, part / "models/model.pt")
        part.rename(model)
    else:
        logger.info("%s is served as it is; delete it to serve %s", model, weights)
    logger.info("MONAI Label: http://127.0.0.1:%d, to be named in 3D Slicer; end it with Ctrl-C", port)
    command = [python, "-m", "monailabel.main", "start_server", "--app", str(app), "--studies", str(studies)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--conf", "models", SEGMENTER]
    _call([*command, "--conf", "zoo_source", "local", "--conf", "sam2", "false"], run)


def _call(command: list[str], run: dict[str, str]) -> None:
    try:
        code = subprocess.run(command, env=run).returncode
    except KeyboardInterrupt:
        return
    if code:
        raise RuntimeError(f"MONAI Label ended with {code}; what it said stands above")

"""Runs docs/first_hour.ipynb from the top, as a reader does, and writes it with its outputs.

    .venv/bin/python ci/notebook.py docs/first_hour.ipynb

Needs `nbclient` and `ipykernel`, which ci/setup.sh installs. The settings are those of its cell, but for what is given
here. In the outputs the folder of the checkout becomes `.`, that of the environment `.venv`; pictures are kept as a
palette of 128 colours, so that the file stays small.
"""

from __future__ import annotations

import base64
import io
import re
import sys
import time
from pathlib import Path
from typing import Any

import fire
import nbformat
from nbclient import NotebookClient
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "docs/first_hour.ipynb"
SETTINGS = ("own_image", "own_label", "output", "seed")
_COLOURS = 128


def with_settings(notebook: Any, changed: dict[str, Any]) -> None:
    """Give other values to the lines of the settings cell.

    Raises:
        ValueError: when the cell does not have a setting.
    """
    (cell,) = (cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.startswith("own_image ="))
    for name, value in changed.items():
        cell.source, count = re.subn(
            rf"^{name} = .*$", lambda _, n=name, v=value: f"{n} = {v!r}", cell.source, flags=re.M
        )
        if count != 1:
            raise ValueError(f"{name}: the settings cell must have one line '{name} = ...', got {count}")


def execute(notebook: Any, *, timeout_s: int) -> float:
    """Run all cells in a kernel of this Python, from the folder of the notebook; seconds that it took.

    Raises:
        nbclient.exceptions.CellExecutionError: with the cell and what it printed.
    """
    start = time.monotonic()
    place = {"metadata": {"path": str(ROOT / "docs")}}
    NotebookClient(notebook, timeout=timeout_s, kernel_name="python3", resources=place, coalesce_streams=True).execute()
    return time.monotonic() - start


def _small_png(encoded: str) -> str:
    picture = (
        Image.open(io.BytesIO(base64.b64decode(encoded))).convert("RGB").quantize(_COLOURS, dither=Image.Dither.NONE)
    )
    buffer = io.BytesIO()
    picture.save(buffer, format="png", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def tidy(notebook: Any) -> None:
    """Make outputs the same wherever they were made: no folder of this machine, no run times, small pictures."""
    for cell in notebook.cells:
        cell.metadata.clear()
        for output in cell.get("outputs", []):
            output.pop("metadata", None) if output.output_type == "stream" else None
            for part in (output, output.get("data", {})):
                for key in ("text", "text/plain", "text/html"):
                    if key in part:
                        text = part[key].replace(str(Path(sys.prefix)), ".venv").replace(f"{ROOT}/", "")
                        part[key] = text.replace(str(ROOT), ".")
            data = output.get("data", {})
            if "image/png" in data:
                data["image/png"] = _small_png(data["image/png"])
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }


def main(out: str, timeout_s: int = 1800, **settings: Any) -> None:
    """Run the notebook and write it.

    Args:
        out: notebook to write.
        timeout_s: of a cell.
        settings: values of the settings cell, `--own_image ct.nii.gz --own_label label.nii.gz --output runs/own`.
    """
    if unknown := set(settings) - set(SETTINGS):
        raise ValueError(f"{', '.join(sorted(unknown))}: no such setting; the settings cell has {', '.join(SETTINGS)}")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    with_settings(notebook, settings)
    seconds = execute(notebook, timeout_s=timeout_s)
    tidy(notebook)
    nbformat.write(notebook, out)
    sys.stdout.write(f"{out}: {seconds:.0f} s, {Path(out).stat().st_size / 1e6:.2f} MB\n")


if __name__ == "__main__":
    fire.Fire(main)

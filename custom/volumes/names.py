"""Names of cases, from the paths of their files."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from custom.runs.files import content_hash

__all__ = ["case_name", "case_names"]


def case_name(path: str) -> str:
    """File name without folder and NIfTI ending, in small or capital letters."""
    return re.sub(r"(\.nii)?(\.gz)?$", "", Path(path).name, flags=re.IGNORECASE)


def case_names(files: Sequence[str]) -> list[str]:
    """One name for each file: its own where no other has it, else as many folders before it as tell the files apart.

    Two of `patient_1/seg.nii.gz` and `patient_2/seg.nii.gz` are `patient_1_seg` and `patient_2_seg`. Names do not
    depend on the order of the files; one listed twice has one name.

    Args:
        files: paths, relative ones to the working directory.
    """
    paths = [os.path.abspath(file) for file in files]
    names: dict[str, str] = {}
    unnamed = sorted(set(paths))
    for folders in range(max((len(Path(path).parts) for path in paths), default=0)):
        tails = {path: _tail(path, folders) for path in unnamed}
        shared = Counter([*tails.values(), *names.values()])
        names |= {path: tail for path, tail in tails.items() if shared[tail] == 1}
        unnamed = [path for path in unnamed if path not in names]
    # `a.nii` beside `a.nii.gz`, or folders whose names hold the underscore that joins them
    names |= {path: f"{case_name(path)}_{content_hash(path.encode())}" for path in unnamed}
    return [names[path] for path in paths]


def _tail(path: str, folders: int) -> str:
    before = Path(path).parent.parts[1:]
    return "_".join([*before[max(len(before) - folders, 0) :], case_name(path)])

"""Whether configs and this package belong together, and errors that end in what is wrong.

The one module beside the rooms: every version of `custom` has it here, so that a new bundle can refuse an old package
by name, and an old bundle a new one.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from pathlib import Path
from types import TracebackType

import custom

_OURS = str(Path(__file__).parent) + os.sep
_CHAINED = re.compile(r"\n\n(?:The above exception was the direct cause of|During handling of the above).*:\n\n")
_LAST_FRAME = re.compile(r'.*\n  File "([^"]*)", line \d+, in .*?\n((?:    .*\n)*)(.*)', re.S)


def check_version(*, needed: str) -> None:
    """Refuses configs and parts of different versions: another `custom` may lie first on the path, or in memory.

    Every run calls it first, so from here on an error of `python -m monai.bundle` ends in its cause.

    Args:
        needed: `custom_version` of the bundle's metadata.

    Raises:
        ValueError: naming both versions and the folder that was imported.
    """
    if Path(sys.argv[0]).parts[-3:] == ("monai", "bundle", "__main__.py"):
        sys.excepthook = show_cause_last
    if needed != custom.__version__:
        raise ValueError(
            f"custom: version {custom.__version__} was imported from {Path(__file__).parent}, the bundle's "
            f"metadata.json needs custom_version {needed}; use the folder custom/ that came with the bundle, start "
            "elsewhere than in a folder with another custom/, or reinstall the package"
        )


def show_cause_last(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """An exception hook: the traceback as usual, then one line "ERROR: <cause>", which MONAI's wrappers would bury.

    Under `torchrun` the line is also what its summary quotes.
    """
    sys.__excepthook__(kind, error, trace)
    if not isinstance(error, Exception):
        return
    line = f"ERROR: {cause_of(error)}"
    sys.stderr.write(line + "\n")
    report = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if report:
        details = {"py_callstack": line, "timestamp": str(int(time.time()))}
        Path(report).write_text(json.dumps({"message": {"message": line, "extraInfo": details}}))


def cause_of(error: BaseException) -> str:
    """The most useful message of a chain of exceptions, on one line.

    That is the outermost one that this package raised, since it names file, rule and remedy; without any the innermost.
    """
    chain: list[tuple[str, str]] = []
    following: BaseException | None = error
    while following is not None:
        chain += _raised(following)
        following = following.__cause__ or (None if following.__suppress_context__ else following.__context__)
    ours = [message for place, message in chain if place.startswith(_OURS)]
    return " ".join((ours[0] if ours else chain[-1][1]).split())


def _raised(error: BaseException) -> list[tuple[str, str]]:
    """File that raised it and message; of an error of a loading process all of its own chain, outermost first."""
    text = str(error)
    if "Original Traceback" in text:
        blocks = reversed(_CHAINED.split(text.rstrip("\n") + "\n"))
        found = [match for block in blocks if (match := _LAST_FRAME.match(block))]
        return [(match[1], re.sub(r"^[\w.]+: ", "", match[3])) for match in found]
    trace, place = error.__traceback__, ""
    while trace is not None:
        place, trace = trace.tb_frame.f_code.co_filename, trace.tb_next
    name = type(error).__name__
    return [(place, text if isinstance(error, (ValueError, OSError, RuntimeError)) and text else f"{name}: {text}")]

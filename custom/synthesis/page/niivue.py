"""NiiVue, a viewer of volumes by WebGL2, as the package `ipyniivue` brings it along."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

__all__ = ["NiiVue", "find_niivue"]

_PACKAGE, _WIDGET = "ipyniivue", "ipyniivue/static/widget.js"
_INSTALL = "pip install --no-deps ipyniivue==2.4.4"
_MODULE = re.compile(r'"([\w%.!~*\'()-]{100000,})"')
"""A text in quotes as `encodeURIComponent` gives it: the whole library, which NiiVue keeps to save pages with."""
_EXPORT = re.compile(r"export\s*\{[^{}]*\bNiivue\b[^{}]*\};?\s*$")


class NiiVue(NamedTuple):
    """The viewer's library, or why there is none.

    Attributes:
        module: source of an ES module that exports `Niivue`; empty without the package.
        version: of the package that it comes from.
        licence: its notice, which goes wherever the module goes.
        missing: one sentence on why there is no module and what to do; empty when there is one.
    """

    module: str = ""
    version: str = ""
    licence: str = ""
    missing: str = ""


def find_niivue() -> NiiVue:
    """NiiVue from the installed package. Nothing is downloaded, and the package is not imported.

    Its widget for Jupyter cannot do without Jupyter, but holds, as a text, NiiVue as one self-contained module.
    """
    try:
        package = distribution(_PACKAGE)
    except PackageNotFoundError:
        return NiiVue(missing=f"the package {_PACKAGE} is not installed; {_INSTALL}, then run `reporting` again")
    other = f"its version {package.version} is laid out differently; {_INSTALL}, then run `reporting` again"
    try:
        widget = Path(str(package.locate_file(_WIDGET))).read_text(encoding="utf-8")
    except OSError:
        return NiiVue(missing=f"the package {_PACKAGE} has no {_WIDGET}: {other}")
    modules = [unquote(text) for text in _MODULE.findall(widget)]
    found = [module for module in modules if _EXPORT.search(module)]
    notice = next((file for file in package.files or () if file.name.upper().startswith("LICENSE")), None)
    if not found or notice is None:
        return NiiVue(missing=f"the package {_PACKAGE} holds no module of NiiVue with its licence: {other}")
    return NiiVue(found[0], package.version, notice.read_text(encoding="utf-8"))

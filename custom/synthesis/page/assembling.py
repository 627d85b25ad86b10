"""The page put together: template, style and script from their files, pictures inlined, within a number of bytes."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

__all__ = ["Picture", "fitting", "render", "spread"]

Item = TypeVar("Item")
_HERE = Path(__file__).parent
_TEMPLATES = Environment(
    loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
)


class Picture(NamedTuple):
    """A picture of the page.

    Attributes:
        kind: "png" or "webp".
        content: of the file.
        caption: text, which also stands for the picture where it is not seen.
    """

    kind: str
    content: bytes
    caption: str

    @property
    def source(self) -> str:
        """What the page shows: a data URI."""
        return f"data:image/{self.kind};base64,{base64.b64encode(self.content).decode()}"

    @property
    def size(self) -> int:
        """Bytes that it takes on the page, at most."""
        return len(self.source) + 12 * len(self.caption) + 200  # twice, each sign at most six bytes, and the tags


def spread(items: Sequence[Item], count: int) -> list[Item]:
    """So many of some items, or all of them, at even distances from the first to the last."""
    places = np.linspace(0, len(items) - 1, min(count, len(items))).round().astype(int)
    return [items[k] for k in places]


def fitting(pictures: Sequence[Picture], room: int) -> list[Picture]:
    """As many pictures, by `spread`, as take at most so many bytes on a page together."""
    counts = range(len(pictures), 0, -1)
    tries = (spread(pictures, count) for count in counts)
    return next((some for some in tries if sum(picture.size for picture in some) <= room), [])


def render(**context: Any) -> str:
    """The page of a context; whatever stands in names and texts is text on the page."""
    # Both are ours and go in as they are; `</script` stands in neither.
    files = {name: Markup((_HERE / file).read_text(encoding="utf-8")) for name, file in _FILES.items()}
    return _TEMPLATES.get_template("page.html").render(**files, **context) + "\n"


_FILES = {"style": "page.css", "viewer_script": "viewer.js"}

"""One colour for each label id, the same in every picture and viewer."""

from __future__ import annotations

import matplotlib
from matplotlib.colors import to_hex

# Ours: told apart on grey and beside the neighbours that these labels have in a heart; thin ones are the brightest.
_OF_A_HEART = (
    *("#f2a541", "#ff9db5", "#a06bff", "#35c4f0", "#3f6cff"),  # myocardium, left and right chambers
    *("#ff3030", "#1fb5a3", "#e13fe0", "#ffe600", "#6fe07f"),  # great vessels, appendage, coronaries, pulmonary veins
)
_FURTHER = matplotlib.colormaps["tab20"]


def label_colour(label_id: int) -> str:
    """Colour of a label, as `#rrggbb`; ids beyond ten repeat twenty further colours.

    Args:
        label_id: 1 or more; 0 is the background, which is black.
    """
    if label_id == 0:
        return "#000000"
    if label_id <= len(_OF_A_HEART):
        return _OF_A_HEART[label_id - 1]
    return to_hex(_FURTHER((label_id - len(_OF_A_HEART) - 1) % 20))

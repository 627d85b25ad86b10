"""What the gate rejected, in words that need no knowledge of its limits."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

__all__ = ["in_words"]

_NUMBER = r"([+-]?[\d.]+|nan)"


def _error(name: str, error: str, limit: Any) -> str:
    brighter = "darker" if error.startswith("-") else "brighter"
    return (
        f"{name}: {error.lstrip('+-')} HU {brighter} on average than in the template ({limit} HU are allowed), so "
        "its contrast is not that of the scan it was made after."
    )


def _spread(name: str, ratio: str, limit: Any) -> str:
    return (
        f"{name}: its brightness varies {ratio} times as much as in the template (at most {limit} times), as "
        "with noise or streaks."
    )


def _plausible(name: str, mean: str, low: str, high: str) -> str:
    return f"{name}: {mean} HU on average, which no scan shows (plausible are {low} to {high} HU)."


def _contrast(share: str, limit: str) -> str:
    return (
        f"Vessels are too faint: they stand out from the tissue around them by {_percent(share)} of what they do in "
        f"the template (at least {_percent(limit)})."
    )


def _continuity(share: str, limit: str) -> str:
    return (
        "Vessels are interrupted: the share of their course that is bright enough to follow is "
        f"{_percent(share)} of that in the template (at least {_percent(limit)})."
    )


def _copy(correlation: str, limit: str) -> str:
    return (
        f"Too much like its template: the fine texture inside the labels correlates by {correlation} with it (at most "
        f"{limit}). A copy teaches nothing new, and shows the patient."
    )


def _score(score: str, limit: str) -> str:
    return f"Expected to be wrong by {score} HU, mean over the labels (at most {limit} HU)."


def _percent(share: str) -> str:
    return f"{100 * float(share):.0f} %"


_OF_A_LABEL: dict[str, tuple[str, Callable[..., str]]] = {
    "max_label_error_hu": (rf"label (\d+) is {_NUMBER} HU off its template", _error),
    "max_label_sd_ratio": (rf"label (\d+) has {_NUMBER} times the SD of its template", _spread),
    "plausible_hu": (rf"label (\d+) has {_NUMBER} HU, plausible are {_NUMBER} to {_NUMBER}", _plausible),
}
_OF_ALL: dict[str, tuple[str, Callable[..., str]]] = {
    "min_vessel_contrast": (rf"{_NUMBER}, at least {_NUMBER}", _contrast),
    "min_vessel_continuity": (rf"{_NUMBER}, at least {_NUMBER}", _continuity),
    "max_template_copy": (rf"{_NUMBER}, at most {_NUMBER}", _copy),
    "max_score_hu": (rf"{_NUMBER}, at most {_NUMBER}", _score),
}


def in_words(reason: str, *, label_names: Sequence[str], gate: Mapping[str, Any]) -> str:
    """One sentence for one broken limit.

    Args:
        reason: of `custom.evaluation.gate.rejections`, "limit: what is wrong".
        label_names: one for each id, background first.
        gate: limits by name, of the provenance; what it lacks is called "the limit".

    Returns:
        the sentence; of a limit that is not known here, the reason as it is.
    """
    limit, _, rest = reason.partition(": ")
    if limit in _OF_A_LABEL:
        pattern, sentence = _OF_A_LABEL[limit]
        if (found := re.fullmatch(pattern, rest)) and int(found[1]) < len(label_names):
            name = label_names[int(found[1])]
            known = () if limit == "plausible_hu" else (gate.get(limit, "the limit"),)
            return sentence(name[:1].upper() + name[1:], *found.groups()[1:], *known)
    if limit in _OF_ALL:
        pattern, sentence = _OF_ALL[limit]
        if found := re.fullmatch(pattern, rest):
            return sentence(*found.groups())
    return reason

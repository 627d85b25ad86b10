"""Limits that a volume must keep before it may be written: one idea, for label maps and for images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from custom.runs.options import is_number

__all__ = ["Gate"]

Kind = TypeVar("Kind", bound="Gate")


@dataclass(frozen=True)
class Gate:
    """Limits of acceptance; None switches one off. What a volume breaks are its rejections.

    Fields named `min_...` and `max_...` are numbers, `plausible_hu` is a range for each label id, all others are
    ranges of what is at least 0.
    """

    @classmethod
    def from_config(cls: type[Kind], limits: Mapping[str, Any]) -> Kind:
        """A gate from a config dictionary; limits not named keep their default.

        Raises:
            ValueError: naming an unknown limit and all that exist, or what is no number or range.
        """
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(limits) - set(known))
        if unknown:
            raise ValueError(f"gate: {unknown} do not exist; the limits are {known}")
        return cls(**{name: None if value is None else _limit(name, value) for name, value in limits.items()})


def _limit(name: str, value: Any) -> Any:
    if name.startswith(("min_", "max_")):
        if not is_number(value):
            raise ValueError(f"gate: {name} must be a number or null, got {value}")
        return value
    if name == "plausible_hu":
        if not isinstance(value, Mapping):
            raise ValueError(f"gate: {name} must be a range for each label id, or null, got {value}")
        return {int(k): _range(f"{name} of label {k}", v) for k, v in value.items()}
    low, high = _range(name, value)
    if low < 0:
        raise ValueError(f"gate: {name} must be [lowest, highest], at least 0, or null, got {value}")
    return low, high


def _range(name: str, value: Any) -> tuple[float, float]:
    if not (isinstance(value, Sequence) and len(value) == 2 and all(map(is_number, value)) and value[0] < value[1]):
        raise ValueError(f"gate: {name} must be [lowest, highest] or null, got {value}")
    return float(value[0]), float(value[1])

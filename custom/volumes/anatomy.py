"""The label map as one table: a row a label, and every list that a stage asks for is a column of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from custom.runs.options import is_number

__all__ = ["Anatomy", "Label"]

_SWITCHES = ("thin", "homogeneous", "wall", "keep")


@dataclass(frozen=True)
class Label:
    """What is known of one label.

    Attributes:
        name: for messages, reports and pictures.
        nominal_hu: usual mean in the scans at hand, HU; paints what no template tells. None where nothing is painted.
        plausible_hu: lowest and highest mean that a scan can have, HU; None: any.
        contrast_sd_hu: SD of the label's own change of contrast from one synthetic volume to the next, HU.
        pool: name of the blood that fills it; labels of one pool share their contrast where it is drawn anew (`mode`
            "painted"). None: it varies alone.
        thin: tubular, like vessels and airways: drawn again along its centre lines, painted and never copied from a
            template, heavier in losses and crops, measured and projected as a vessel. It wins over other labels.
        aligns: whether it drives the registration of a template; None: unless it is thin.
        homogeneous: whether noise is measured in it.
        components: how many pieces it has; smaller ones beyond that are voxel noise.
        handles: tunnels that may stay; with more than that, all are cut.
        touches: ids of labels that each of its pieces must touch.
        wall: whether its thickness is measured and kept.
        keep: take it as it is: neither smoothed nor brought to components and handles.
        class_weight: in the losses of the segmenter, above 0.
        pieces_kept: so many largest pieces of a segmentation are kept, 1 or 2; None keeps all.
    """

    name: str
    nominal_hu: float | None = None
    plausible_hu: Sequence[float] | None = None
    contrast_sd_hu: float = 0.0
    pool: str | None = None
    thin: bool = False
    aligns: bool | None = None
    homogeneous: bool = False
    components: int = 1
    handles: int = 0
    touches: Sequence[int] = ()
    wall: bool = False
    keep: bool = False
    class_weight: float = 1.0
    pieces_kept: int | None = None

    def __post_init__(self) -> None:
        for name in ("contrast_sd_hu", "class_weight", "components", "handles", "nominal_hu"):
            value, whole = getattr(self, name), name in ("components", "handles")
            if not (value is None and name == "nominal_hu") and not (
                is_number(value) and (value % 1 == 0 or not whole)
            ):
                raise ValueError(f"{self.name}: {name} must be a {'whole ' * whole}number, got {value!r}")
        for name in _SWITCHES:
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{self.name}: {name} must be true or false, got {getattr(self, name)!r}")
        if not isinstance(self.touches, (list, tuple)):
            raise ValueError(f"{self.name}: touches must be a list of label ids, got {self.touches!r}")
        if self.pool is not None and (not isinstance(self.pool, str) or not self.pool.strip()):
            raise ValueError(f"{self.name}: pool must be a text or null, got {self.pool!r}")
        if self.components < 1:
            raise ValueError(f"{self.name}: components must be at least 1, got {self.components}; leave the label out")
        if self.handles < 0:
            raise ValueError(f"{self.name}: handles must not be negative, got {self.handles}")
        if self.contrast_sd_hu < 0:
            raise ValueError(f"{self.name}: contrast_sd_hu must not be negative, got {self.contrast_sd_hu}")
        if self.class_weight <= 0:
            raise ValueError(f"{self.name}: class_weight must be above 0, got {self.class_weight}")
        if self.pieces_kept not in (None, 1, 2) or isinstance(self.pieces_kept, bool):
            raise ValueError(f"{self.name}: pieces_kept must be 1, 2 or null for all, got {self.pieces_kept}")
        limits = self.plausible_hu
        if limits is not None and not (
            isinstance(limits, (list, tuple))
            and len(limits) == 2
            and all(map(is_number, limits))
            and limits[0] < limits[1]
        ):
            raise ValueError(f"{self.name}: plausible_hu must be [lowest, highest] mean or null, got {limits}")


class Anatomy:
    """The labels of a label map, background included, and what stages ask of them.

    Args:
        rows: label id (a number or its text) -> columns of :class:`Label`; what a row leaves out has its default. Ids
            are 0, the background, to the number of labels less 1.

    Raises:
        ValueError: naming the row: on an unknown column, ids with gaps, two labels of one name, or a label that must
            touch one which is not there.
    """

    def __init__(self, rows: Mapping[Any, Mapping[str, Any]]) -> None:
        if not isinstance(rows, Mapping) or not all(isinstance(row, Mapping) for row in rows.values()):
            raise ValueError(f"anatomy: must be a table, with a row of columns for each label id, got {rows!r}")
        self.labels = {_label_id(key): _label(key, row) for key, row in rows.items()}
        self.num_labels = len(self.labels)
        if sorted(self.labels) != list(range(self.num_labels)) or self.num_labels < 2:
            raise ValueError(
                f"anatomy: ids must be 0 (background), 1, 2 and so on without gaps, got {sorted(self.labels)}; "
                "renumber the labels with `label_mapping`"
            )
        if len(set(self.names)) < self.num_labels:
            raise ValueError(f"anatomy: every label needs a name of its own, got {self.names}")
        for k, label in self.labels.items():
            unknown = [other for other in label.touches if other not in self.structures or other == k]
            if unknown:
                raise ValueError(
                    f"anatomy: {label.name} must touch {unknown}, which are no other labels of the table; `touches` "
                    "lists their ids"
                )

    def _column(self, name: str) -> list[Any]:
        return [getattr(self.labels[k], name) for k in range(self.num_labels)]

    def _ids(self, name: str) -> list[int]:
        return [k for k, label in sorted(self.structures.items()) if getattr(label, name)]

    def columns(self, *names: str) -> dict[str, dict[str, Any]]:
        """Label id, as text -> so many of its columns, with their defaults: what a stage makes use of."""
        return {str(k): {name: getattr(self.labels[k], name) for name in names} for k in range(self.num_labels)}

    @property
    def structures(self) -> dict[int, Label]:
        """Label id -> label, without the background."""
        return {k: label for k, label in self.labels.items() if k > 0}

    @property
    def foreground(self) -> list[int]:
        """All ids but the background's."""
        return sorted(self.structures)

    @property
    def names(self) -> list[str]:
        """One for each id, background first."""
        return self._column("name")

    @property
    def nominal_hu(self) -> list[float]:
        """One for each id, background first.

        Raises:
            ValueError: naming the labels that have none.
        """
        missing = [label.name for label in self.labels.values() if label.nominal_hu is None]
        if missing:
            raise ValueError(f"anatomy: nominal_hu is needed to paint {missing}; add it to their rows")
        return self._column("nominal_hu")

    @property
    def plausible_hu(self) -> dict[int, Sequence[float]]:
        """Id -> lowest and highest mean, of the labels that have limits."""
        return {k: label.plausible_hu for k, label in self.structures.items() if label.plausible_hu is not None}

    @property
    def contrast_sd_hu(self) -> list[float]:
        """One for each id, background first."""
        return self._column("contrast_sd_hu")

    @property
    def pool(self) -> list[str | None]:
        """One for each id, background first."""
        return self._column("pool")

    @property
    def thin(self) -> list[int]:
        """Ids of tubular labels."""
        return self._ids("thin")

    @property
    def origins(self) -> list[int]:
        """Ids that tubular labels must touch: what vessels come from."""
        return sorted({other for k in self.thin for other in self.labels[k].touches})

    @property
    def aligning(self) -> list[int]:
        """Ids that drive the registration of a template."""
        return [k for k, s in sorted(self.structures.items()) if (not s.thin if s.aligns is None else s.aligns)]

    @property
    def homogeneous(self) -> list[int]:
        """Ids of labels in which noise is measured."""
        return self._ids("homogeneous")

    @property
    def pieces_kept(self) -> dict[int, int]:
        """Id -> how many of its largest pieces a segmentation keeps, of the labels that have such a number."""
        return {k: label.pieces_kept for k, label in self.structures.items() if label.pieces_kept is not None}

    @property
    def class_weights(self) -> list[float]:
        """One for each id, background first."""
        return self._column("class_weight")


def _label_id(key: Any) -> int:
    try:
        return int(key)
    except (TypeError, ValueError) as error:
        raise ValueError(f"anatomy: rows are keyed by label ids, got {key!r}") from error


def _label(key: Any, row: Mapping[str, Any]) -> Label:
    known = [field.name for field in fields(Label)]
    unknown = sorted(set(row) - set(known))
    if unknown or "name" not in row:
        raise ValueError(
            f"anatomy: row {key} has unknown columns {unknown} or no name; the columns are {known}, of which name "
            "must be there"
        )
    if not isinstance(row["name"], str) or not row["name"].strip():
        raise ValueError(f"anatomy: row {key}: name must be a text, got {row['name']!r}")
    return Label(**{column: _switch(column, value) for column, value in row.items()})


def _switch(column: str, value: Any) -> Any:
    """True and False of the words true and false, which the command line hands on as they are."""
    word = str(value).lower()
    return word == "true" if column in _SWITCHES and word in ("true", "false") else value

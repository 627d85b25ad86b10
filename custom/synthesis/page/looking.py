"""Every case of a report read once: traits, picture and volumes for the viewer are made while it is at hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from custom.evaluation.traits import case_traits
from custom.synthesis.page.assembling import Picture
from custom.synthesis.page.pictures import pair_picture
from custom.synthesis.page.viewer import Shown, for_viewer
from custom.synthesis.page.volumes import Case, SetVolumes

__all__ = ["Seen", "look"]

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Seen:
    """What a page shows of its cases.

    Attributes:
        traits: of `custom.evaluation.traits.case_traits`, by case; those of a template by its name.
        templates: names of the templates among them.
        pictures: each case beside its template, by case.
        viewed: for the viewer, by case.
    """

    traits: dict[str, dict[str, Any]] = field(default_factory=dict)
    templates: dict[str, dict[str, Any]] = field(default_factory=dict)
    pictures: dict[str, Picture] = field(default_factory=dict)
    viewed: dict[str, Shown] = field(default_factory=dict)


def look(
    volumes: SetVolumes,
    *,
    compared: Sequence[Record],
    pictured: Sequence[Record],
    viewed: Sequence[Record],
    label_names: Sequence[str],
    vessel_labels: Sequence[int],
) -> Seen:
    """Read every case that is asked for, and every template of theirs, once; one of each is in memory.

    Args:
        volumes: of the set.
        compared: records of cases whose traits, and those of their templates, are wanted.
        pictured: records of cases that are drawn.
        viewed: records of cases that the viewer shows.
        label_names: one for each id, background first.
        vessel_labels: ids of vessels.

    Raises:
        FileNotFoundError, ValueError: naming a file that is not one volume.
    """

    def traits(case: Case) -> dict[str, Any]:
        return case_traits(case.image, case.label, case.spacing_mm, label_names=label_names, thin_labels=vessel_labels)

    seen, names = Seen(), [{record["case"] for record in records} for records in (compared, pictured, viewed)]
    wanted = {record["case"]: record for record in (*compared, *pictured, *viewed)}
    for template_name, records in groupby(sorted(wanted.values(), key=volumes.template_name), volumes.template_name):
        group = list(records)
        template = volumes.template(group[0])
        small = for_viewer(template, vessel_labels) if names[2] & {record["case"] for record in group} else template
        if names[0] & {record["case"] for record in group}:
            seen.templates[template_name] = traits(template)
        for record in group:
            case, name = volumes.synthetic(record), record["case"]
            if name in names[0]:
                seen.traits[name] = traits(case)
            if name in names[1]:
                caption = f"{name}, score {record['score_hu']:.1f} HU, made after {template_name}"
                content = pair_picture(case, template, vessel_labels=vessel_labels)
                seen.pictures[name] = Picture("webp", content, caption)
            if name in names[2]:
                note = "kept apart" if record["rejected"] else f"score {record['score_hu']:.1f} HU"
                texts = {"case": name, "template": template_name, "note": note}
                seen.viewed[name] = texts, for_viewer(case, vessel_labels), small
    return seen

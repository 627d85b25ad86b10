"""`custom/` has a room for every stage, and a table says which room may import which (the map in CONTRIBUTING)."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from helpers import BUNDLE, ROOT, SEG_BUNDLE

CUSTOM = ROOT / "custom"
GROUND = {"runs", "geometry", "volumes"}
MAY_IMPORT: dict[str, set[str]] = {
    "checks": set(),
    "runs": set(),
    "geometry": set(),
    "volumes": {"runs", "geometry"},
    "masks": GROUND,
    "diffusion": GROUND,
    "segmentation": GROUND,
    "evaluation": GROUND,
    "phantom": GROUND,
    "confidence": GROUND | {"diffusion"},
    "synthesis": GROUND | {"evaluation"},
    "study": {"runs", "volumes", "masks", "evaluation", "synthesis"},
}
"""Room -> other rooms that it may import. Data flows one way: nothing imports upwards or round in a circle."""
MATHS = {"torch", "numpy", "scipy", "skimage"}
"""What `geometry` may import besides the standard library: labels and tensors, no files, no MONAI."""


def room_of(module: str) -> str:
    """Room of a dotted name below `custom`."""
    return module.split(".")[1]


MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(CUSTOM.rglob("*.py"))
    if path != CUSTOM / "__init__.py"
}


def imported(source: str, module: str = "custom.room.module") -> set[str]:
    """Dotted names of all that a module imports, wherever in the file; relative imports are resolved."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = module.split(".")[: -node.level] if node.level else []
            base = ".".join([*package, *filter(None, [node.module])])
            names |= {f"{base}.{alias.name}" for alias in node.names} if base == "custom" else {base}
    return names


def rooms_imported(source: str, module: str = "custom.room.module") -> set[str]:
    """Rooms of `custom` among the imports, but for the module's own."""
    own = {room_of(name) for name in imported(source, module) if name.startswith("custom.")}
    return own - {room_of(module)}


def calls(source: str, function: str) -> list[int]:
    """Lines that call a function by its bare name."""
    nodes = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))
    return [node.lineno for node in nodes if isinstance(node.func, ast.Name) and node.func.id == function]


@pytest.mark.parametrize(
    "source",
    [
        "import custom.masks.gate",
        "from custom.masks.gate import x",
        "from custom.masks import gate",
        "from custom import masks",
        "from .. import masks",
        "from ..masks.gate import x",
        "def f():\n    import custom.masks as m",
    ],
)
def test_every_way_to_import_is_seen(source: str) -> None:
    assert rooms_imported(source) == {"masks"}


def test_modules_of_others_and_of_the_own_room_are_not_taken_for_other_rooms() -> None:
    assert rooms_imported("import customary.masks\nfrom torch.masks import custom\nfrom .other import x") == set()


def test_a_print_is_seen_only_where_it_is_called() -> None:
    assert calls("x = 'print(1)'\nif x:\n    print(x)", "print") == [3]


def test_rooms_are_those_of_the_table() -> None:
    assert {room_of(module) for module in MODULES} == set(MAY_IMPORT), "add a new room to MAY_IMPORT, and say why"


@pytest.mark.parametrize("module", MODULES)
def test_module_imports_only_what_its_room_may(module: str) -> None:
    forbidden = rooms_imported(MODULES[module].read_text(), module) - MAY_IMPORT.get(room_of(module), set())
    assert not forbidden, f"{MODULES[module]} imports {sorted(forbidden)}, which the table does not allow"


def test_the_table_has_no_circle() -> None:
    try:
        TopologicalSorter(MAY_IMPORT).prepare()
    except CycleError as error:
        pytest.fail(f"rooms may import one another in a circle: {' <- '.join(error.args[1])}")


def test_no_modules_import_one_another_in_a_circle() -> None:
    graph = {name: imported(path.read_text(), name) & set(MODULES) for name, path in MODULES.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"modules import one another in a circle: {' <- '.join(error.args[1])}")


@pytest.mark.parametrize("module", [name for name in MODULES if room_of(name) == "geometry"])
def test_geometry_needs_no_more_than_numerics(module: str) -> None:
    allowed = MATHS | sys.stdlib_module_names | {"custom"}
    foreign = {name for name in imported(MODULES[module].read_text(), module) if name.split(".")[0] not in allowed}
    assert not foreign, f"{MODULES[module]} imports {sorted(foreign)}, allowed are {sorted(MATHS)}"


@pytest.mark.parametrize("module", MODULES)
def test_module_logs_and_parses_no_arguments(module: str) -> None:
    source = MODULES[module].read_text()
    assert not calls(source, "print"), f"{MODULES[module]} prints; use logging"
    assert not {name for name in imported(source, module) if name.split(".")[0] == "argparse"}


def named_by_configs(bundle: Path) -> set[tuple[str, str]]:
    """(room, name) of all that a bundle's configs take from `custom`, but for the check of versions."""
    texts = [path.read_text() for path in bundle.glob("configs/*.json")]
    return {pair for text in texts for pair in re.findall(r"custom\.(\w+)\.(\w+)", text)} - {
        ("checks", "check_version")
    }


@pytest.mark.parametrize("room", sorted(set(MAY_IMPORT) - {"checks"}))
def test_a_room_hands_on_what_configs_name_and_nothing_else(room: str) -> None:
    tree = ast.parse((CUSTOM / room / "__init__.py").read_text())
    handed = {alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    wanted = {name for bundle in (BUNDLE, SEG_BUNDLE) for place, name in named_by_configs(bundle) if place == room}
    assert handed == wanted


@pytest.mark.parametrize("room", sorted(set(MAY_IMPORT) - {"checks"}))
def test_nothing_handed_on_has_the_name_of_a_module_of_its_room(room: str) -> None:
    """From Python 3.13 on MONAI would find the module, not the function."""
    tree = ast.parse((CUSTOM / room / "__init__.py").read_text())
    handed = {alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert not handed & {path.stem for path in (CUSTOM / room).glob("*.py")}


def test_the_segmenter_needs_no_diffusion() -> None:
    rooms = sorted({room for room, _ in named_by_configs(SEG_BUNDLE)})
    names = ", ".join(f"custom.{room}" for room in rooms)
    code = f"import json, sys, custom.checks, {names}; print(json.dumps([*sys.modules]))"
    printed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    loaded = {name.split(".")[1] for name in json.loads(printed) if name.startswith("custom.")}
    assert loaded == {*rooms, "checks", "geometry"}
    assert not loaded & {"diffusion", "confidence", "masks", "phantom", "synthesis"}

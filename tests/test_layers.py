"""`custom/` has three layers whose imports only go down: maths, parts, adapters (the tree in README.md)."""

from __future__ import annotations

import ast
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

CUSTOM = Path(__file__).resolve().parents[1] / "custom"
MODULES = sorted(path.stem for path in CUSTOM.glob("*.py") if path.stem != "__init__")

LAYERS: list[set[str]] = [
    {"deformation", "registration", "shape_model", "thinning", "topology", "diffusion", "uncertainty", "vessels"},
    {
        "acceptance",
        "correspondence",
        "mask_generation",
        "mask_preparation",
        "mask_reference",
        "networks",
        "schedulers",
        "losses",
        "metrics",
        "template",
        "pictures",
        "quality",
        "records",
        "residual",
        "set_metrics",
    }
    | {name for name in MODULES if name == "phantom" or name.startswith("phantom_")},
    {
        "checks",
        "confidence",
        "datalists",
        "engines",
        "handlers",
        "inferers",
        "logs",
        "comparison",
        "mask_summary",
        "mask_transforms",
        "measuring",
        "pairs",
        "report",
        "synthesis",
        "transforms",
        "writers",
    },
]
LAYER_OF = {name: layer for layer, names in enumerate(LAYERS) for name in names}
MATHS = {"torch", "numpy", "scipy", "skimage", "monai.networks.blocks"}


def imported(source: str) -> set[str]:
    """Dotted names of all that a module of `custom` imports, wherever in the file."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = ".".join(filter(None, ("custom" if node.level else "", node.module)))
            names |= {f"{module}.{alias.name}" for alias in node.names} if module == "custom" else {module}
    return names


def own(source: str) -> set[str]:
    """Modules of `custom` among the imports."""
    return {name.split(".")[1] for name in imported(source) if name.startswith("custom.")}


def read(module: str) -> str:
    return (CUSTOM / f"{module}.py").read_text()


def calls(source: str, function: str) -> list[int]:
    """Lines that call a function by its bare name."""
    nodes = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))
    return [node.lineno for node in nodes if isinstance(node.func, ast.Name) and node.func.id == function]


@pytest.mark.parametrize(
    "source",
    [
        "import custom.engines",
        "from custom.engines import x",
        "from custom import engines",
        "from . import engines",
        "from .engines import x",
        "def f():\n    import custom.engines as e",
    ],
)
def test_every_way_to_import_is_seen(source: str) -> None:
    assert own(source) == {"engines"}


def test_modules_of_others_are_not_taken_for_ours() -> None:
    assert own("import customary.engines\nfrom torch.engines import custom") == set()


def test_a_print_is_seen_only_where_it_is_called() -> None:
    assert calls("x = 'print(1)'\nif x:\n    print(x)", "print") == [3]


@pytest.mark.parametrize("module", MODULES)
def test_module_has_a_layer(module: str) -> None:
    assert module in LAYER_OF, f"custom/{module}.py is in no layer; add it to LAYERS in {Path(__file__).name}"


@pytest.mark.parametrize("module", MODULES)
def test_module_imports_only_its_own_or_a_lower_layer(module: str) -> None:
    top = len(LAYERS)
    upwards = {name for name in own(read(module)) if LAYER_OF.get(name, top) > LAYER_OF.get(module, top)}
    assert not upwards, f"custom/{module}.py (layer {LAYER_OF[module]}) imports upwards: {sorted(upwards)}"


def test_no_imports_go_round() -> None:
    graph = {module: own(read(module)) for module in MODULES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"modules import one another in a circle: {' <- '.join(error.args[1])}")


@pytest.mark.parametrize("module", sorted(LAYERS[0]))
def test_layer_0_needs_no_more_than_numerics(module: str) -> None:
    allowed = MATHS | sys.stdlib_module_names | {"custom"}
    foreign = {n for n in imported(read(module)) if not any(n == a or n.startswith(f"{a}.") for a in allowed)}
    assert not foreign, f"custom/{module}.py (layer 0) imports {sorted(foreign)}, allowed are {sorted(MATHS)}"


@pytest.mark.parametrize("module", [name for name in MODULES if LAYER_OF.get(name, 0) < 2])
def test_layers_0_and_1_parse_no_arguments(module: str) -> None:
    assert not {name for name in imported(read(module)) if name.split(".")[0] == "argparse"}


@pytest.mark.parametrize("module", MODULES)
def test_module_logs_and_never_prints(module: str) -> None:
    lines = calls(read(module), "print")
    assert not lines, f"custom/{module}.py prints at line {lines}; use logging"

"""Imports point one way: a module stands on a floor, and sees the floors below it, never one above.

The picture is in docs/design.md. Inside a room modules may import one another, but not in a circle.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

FLOORS = (
    ("data.files", "model.megatron"),
    ("data.config", "data.tokenizer", "model.backend", "model.config", "model.device", "model.precision"),
    ("data.prepared", "model.rules"),
    ("data.lanes", "data.synthetic", "model.sharding"),
    ("data.preparation", "model.layers"),
    ("model.decoder",),
    ("model.compiling", "model.huggingface"),
    ("pipeline.figures", "pipeline.config"),
    ("pipeline.parallel",),
    ("pipeline.schedule",),
    ("pipeline.accounting",),
    ("pipeline.checkpoint",),
    ("pipeline.reporting", "pipeline.huggingface"),
    ("pipeline.inference",),
    ("pipeline.evaluation",),
    ("pipeline.training",),
    ("pipeline.benchmarks", "pipeline.tracing"),
    ("launch.arguments", "launch.processes"),
    ("launch.commands",),
    ("launch.cli",),
)
"""From the ground up. Rooms of one floor do not see each other."""


def modules() -> dict[str, Path]:
    """Every module of the product by its dotted name; code that is exported to run elsewhere stands for itself."""
    found = {}
    for package in ("data", "model", "pipeline", "launch"):
        for path in (ROOT / package).rglob("*.py"):
            if "exported" not in path.parts:
                name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
                found[name.removesuffix(".__init__")] = path
    return found


MODULES = modules()


def imports(name: str) -> set[str]:
    """Modules of the product that a module imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            parts = {f"{node.module}.{alias.name}" for alias in node.names}
            # `from package import module`, or `from module import name`.
            found |= {part if part in MODULES else node.module for part in parts}
    return {other for other in found if other in MODULES and other != name}


def floor(name: str) -> int | None:
    """The floor a module stands on; None for a package's own `__init__`."""
    room = ".".join(name.split(".")[:2])
    return next((number for number, rooms in enumerate(FLOORS) if room in rooms), None)


def room(name: str) -> str:
    return ".".join(name.split(".")[:2])


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_point_downwards(name):
    own = floor(name)
    if own is None:
        assert name.count(".") == 0, f"{name} stands on no floor: give its room a place in FLOORS"
        assert not [other for other in imports(name) if other != name], (
            f"{name} is a package's door, and imports nothing"
        )
        return
    for other in imports(name):
        below = floor(other)
        assert below is None or room(other) == room(name) or below < own, (
            f"{name} imports {other}, which is not below it"
        )


def test_no_circles():
    """Not even inside a room."""
    done: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, " -> ".join((*way[way.index(name) :], name))
        if name not in done:
            for other in sorted(imports(name)):
                visit(other, (*way, name))
            done.add(name)

    for name in sorted(MODULES):
        visit(name, ())


def loaded_with(name: str) -> set[str]:
    """All modules that come with a module when it is loaded, the libraries' too; not what functions load later."""
    seen: set[str] = set()
    waiting = [name]
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        if "." in name:
            waiting.append(name.rpartition(".")[0])
        body = ast.parse(MODULES[name].read_text(encoding="utf-8")).body if name in MODULES else []
        inner = [line for node in body if isinstance(node, ast.With) for line in node.body]
        for node in body + inner:
            if isinstance(node, ast.Import):
                waiting += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                parts = {f"{node.module}.{alias.name}" for alias in node.names}
                waiting += [part if part in MODULES else node.module for part in parts]
    return seen


def test_reading_a_checkpoint_loads_no_training():
    """`infini inspect` starts in about a second: torch alone takes most of it, the libraries of training several."""
    heavy = {"deepspeed", "megatron", "transformers", "pipeline.parallel", "pipeline.schedule", "model.decoder"}
    heavy |= {"torch.nn.attention"}  # its mask loads torch's compiler
    own = imports("launch.commands.inspect")
    assert {"pipeline.reporting.inspect", "pipeline.reporting.run_summary"} <= own
    for name in sorted(own):
        assert not heavy & loaded_with(name), f"{name} loads {sorted(heavy & loaded_with(name))}"
    assert heavy & loaded_with("pipeline.training.trainer") == heavy - {"transformers"}


def test_megatron_is_imported_in_one_place():
    """Anywhere else its import would load PyTorch's compiler, unless it came second."""
    for name, path in MODULES.items():
        lines = path.read_text(encoding="utf-8").splitlines()
        direct = [line for line in lines if line.startswith(("import megatron", "from megatron"))]
        assert not direct, f"{name}: {direct[0]}; model/megatron.py has what is used"


def test_model_and_data_do_not_know_each_other():
    for name in MODULES:
        for other in imports(name):
            assert {name.split(".")[0], other.split(".")[0]} != {"model", "data"}, f"{name} imports {other}"


PAGE = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
WINGS = ("data", "model", "pipeline", "launch")


def picture() -> str:
    """The floors as docs/design.md draws them."""
    cells = [[[r.split(".")[1] for r in rooms if r.startswith(f"{wing}.")] for wing in WINGS] for rooms in FLOORS]
    rows = [("", *WINGS)] + [(str(number), *map("  ".join, row)) for number, row in reversed(list(enumerate(cells)))]
    widths = [max(len(row[i]) for row in rows) + 4 for i in range(len(rows[0]))]
    lines = (
        row[0].rjust(2) + "    " + "".join(cell.ljust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
        for row in rows
    )
    return "\n".join(f"    {line}".rstrip() for line in lines)


def test_the_page_has_the_picture():
    assert picture() in PAGE, f"docs/design.md should have:\n{picture()}"


WALKS = [
    re.findall(r"^\d+\. `([\w/]+)\.py`", part, re.MULTILINE)
    for part in re.split(r"^(?!\d+\. )", PAGE.partition("## Walk 1")[2].partition("## A window")[0], flags=re.MULTILINE)
]
WALKS = [walk for walk in WALKS if walk]


@pytest.mark.parametrize("walk", WALKS, ids=lambda walk: walk[-1])
def test_walks_go_down(walk):
    floors = [floor(path.replace("/", ".")) for path in walk]
    assert floors == sorted(floors, reverse=True), list(zip(walk, floors, strict=True))


def test_the_page_has_two_walks():
    assert len(WALKS) == 6 and all(len(walk) > 1 for walk in WALKS), WALKS

"""The floors of the house: imports go down only, and rooms on one floor do not import each other."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = [
    {"config", "files", "progress", "resources"},
    {"kernels"},
    {"decode"},
    {"models", "ops"},
    {"checkpoint", "sampling", "tasks", "volume"},
    {"acceleration", "conversion", "doctor", "pipelines", "report"},
    {"training"},
    {"cli"},
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def room_of(path: Path) -> str:
    relative = path.relative_to(ROOT)
    return "kernels" if relative.parts[0] == "kernels" else relative.with_suffix("").parts[1]


def imported_rooms(path: Path) -> set[str]:
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            rooms |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("meddiff.")}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            if node.module == "meddiff":
                rooms |= {alias.name for alias in node.names}
            elif (node.module or "").startswith("meddiff."):
                rooms.add(node.module.split(".")[1])
    return rooms & FLOOR.keys()


FILES = sorted([*(ROOT / "meddiff").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])
ROOMS = [path for path in FILES if path != ROOT / "meddiff" / "__init__.py"]


def test_every_room_has_a_floor():
    assert {room_of(path) for path in ROOMS} == set(FLOOR)


@pytest.mark.parametrize("path", ROOMS, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down(path):
    room = room_of(path)
    climbing = {other for other in imported_rooms(path) - {room} if FLOOR[other] >= FLOOR[room]}
    assert climbing == set(), f"{room} is on floor {FLOOR[room]}"


def test_the_package_imports_no_room_by_itself():
    tree = ast.parse((ROOT / "meddiff" / "__init__.py").read_text())
    at_import = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert {alias.name for node in at_import for alias in node.names} == {
        "annotations",
        "importlib",
        "TYPE_CHECKING",
        "Any",
    }

"""A room imports only from floors below its own, as CONTRIBUTING.md's table has them."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import fedekd

ROOT = Path(__file__).resolve().parents[1]
ROOMS = sorted(path.parent.name for path in (ROOT / "fedekd").glob("*/__init__.py"))


def floors() -> dict[str, int]:
    table = re.findall(r"^\| (\d) \| ((?:`\w+/` ?)+) \|", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    return {room: int(floor) for floor, rooms in table for room in re.findall(r"`(\w+)/`", rooms)}


def imported_rooms(room: str) -> Iterator[tuple[str, str]]:
    for path in (ROOT / "fedekd" / room).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                package, _, rest = name.partition(".")
                if package == "fedekd" and rest.partition(".")[0] in ROOMS:
                    yield str(path.relative_to(ROOT)), rest.partition(".")[0]


def test_every_room_has_a_floor() -> None:
    assert sorted(floors()) == ROOMS


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_from_below(room: str) -> None:
    floor = floors()
    for path, other in imported_rooms(room):
        assert other == room or floor[other] < floor[room], f"{path} imports {other}"


def test_rooms_are_reached_by_their_names() -> None:
    commands = {"benchmark", "cli", "configuration", "flower"}  # what they offer is called from a shell
    assert {name for name in fedekd.__all__ if name in ROOMS} == {*ROOMS} - commands
    for name in fedekd.__all__:
        assert name == "__version__" or fedekd.__getattr__(name) is getattr(fedekd, name)

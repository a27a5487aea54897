"""Layers: a package imports only from packages of lower layers."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import fedekd

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = sorted(path.parent.name for path in (ROOT / "fedekd").glob("*/__init__.py"))

#: From the lowest layer to the highest; packages of one layer do not import each other.
LAYERS = (
    ("functional",),
    ("data", "metrics", "models"),
    ("reporting",),
    ("modules",),
    ("methods",),
    ("do_no_harm", "early_exit", "privacy"),
    ("export", "federation", "monitoring"),
    ("configuration",),
    ("benchmark", "flower"),
    ("cli",),
)
LAYER = {package: layer for layer, packages in enumerate(LAYERS) for package in packages}

#: Packages that are run from the command line and have no public names.
COMMANDS = {"benchmark", "cli", "configuration", "flower"}


def imported_packages(package: str) -> Iterator[tuple[str, str]]:
    for path in (ROOT / "fedekd" / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [f"{node.module}.{name.name}" for name in node.names] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                root, _, rest = name.partition(".")
                if root == "fedekd" and rest.partition(".")[0] in PACKAGES:
                    yield str(path.relative_to(ROOT)), rest.partition(".")[0]


def test_layers_all_packages_are_assigned() -> None:
    assert sorted(LAYER) == PACKAGES


@pytest.mark.parametrize("package", PACKAGES)
def test_layers_package_imports_only_lower_layers(package: str) -> None:
    for path, other in imported_packages(package):
        assert other == package or LAYER[other] < LAYER[package], f"{path} imports {other}"


def test_layers_packages_are_attributes_of_fedekd() -> None:
    assert {name for name in fedekd.__all__ if name in PACKAGES} == {*PACKAGES} - COMMANDS
    for name in fedekd.__all__:
        assert name == "__version__" or fedekd.__getattr__(name) is getattr(fedekd, name)

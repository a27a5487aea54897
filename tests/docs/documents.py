"""The documents, and what is read from them."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
FENCE = re.compile(r"^[ ]*```([\w{}-]*)[^\n]*\n(.*?)^[ ]*```$", re.MULTILINE | re.DOTALL)


def documents() -> list[Path]:
    """Return README and the other pages that are written by hand or rendered, built files excluded."""
    pages = [path for path in sorted(DOCS.rglob("*.md")) if "_build" not in path.parts]
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *pages]


def name(path: Path) -> str:
    """Return a path as a test id."""
    return path.relative_to(ROOT).as_posix()


def text(path: Path) -> str:
    """Return the content of a document."""
    return path.read_text(encoding="utf-8")


def blocks(path: Path, language: str) -> list[str]:
    """Return the fenced blocks of a language."""
    return [content for found, content in FENCE.findall(text(path)) if found == language]


def prose(path: Path) -> str:
    """Return the text outside of fenced blocks."""
    return FENCE.sub("", text(path))


def inline_code(path: Path) -> list[str]:
    """Return the inline code outside of fenced blocks."""
    return re.findall(r"`([^`\n]+)`", prose(path))


def commands(path: Path) -> Iterator[str]:
    """Yield the lines of the bash blocks."""
    for block in blocks(path, "bash"):
        yield from (line.strip() for line in block.replace("\\\n", " ").splitlines() if line.strip())


def load(path: Path) -> ModuleType:
    """Import a file that is in no package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)
    spec.loader.exec_module(module)
    return module

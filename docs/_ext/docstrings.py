"""Translate `code` and $math$ in docstrings, and resolve names to their pages."""

from __future__ import annotations

import re
from importlib import import_module
from typing import Any

from docutils import nodes
from sphinx.addnodes import pending_xref

_CODE = re.compile(r"(?<![`:\w])`([^`\n]+)`(?!`)")
_TABLE = re.compile(r"(?:^[ ]*\|.*\|[ ]*(?:\n|\Z)){2,}", re.MULTILINE)
_MATH = re.compile(r"(?<![$\\])\$([^$\n]+(?:\n[^$\n]+){0,2})\$(?!\$)")


def to_rst(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Translate inline code and math of a docstring, in place."""
    text = "\n".join(lines)
    text = re.sub(r"^([ ]*)\$\$(.+?)\$\$", _display, text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"(?<!:):\n\n(?=[ ]{4,}\S)", "::\n\n", text)  # an indented block is preformatted
    text = _TABLE.sub(_list_table, text)
    text = _CODE.sub(r"``\1``", text)
    text = re.sub(r"(``[^`\n]+``)(?=\w)", r"\1\\ ", text)  # a plural s after code
    text = _MATH.sub(lambda match: f":math:`{' '.join(match[1].split())}`", text)
    lines[:] = text.split("\n")


def _list_table(match: re.Match[str]) -> str:
    rows = [line.strip().strip("|").split(" | ") for line in match[0].strip("\n").split("\n")]
    indent = re.match(r"[ ]*", match[0])[0]  # type: ignore[index]
    lines = ["", ".. list-table::", "   :header-rows: 1", ""]
    for row in (rows[0], *rows[2:]):
        lines += [f"   {'*' if index == 0 else ' '} - {cell.strip()}" for index, cell in enumerate(row)]
    return "\n".join(indent + line if line else "" for line in [*lines, "", ""])


def _display(match: re.Match[str]) -> str:
    indent, formula = match[1], " ".join(match[2].split())
    return f"\n{indent}.. math:: {formula}\n"


def resolve(app: Any, env: Any, node: pending_xref, content: nodes.TextElement) -> nodes.Element | None:
    """Resolve `fedekd.methods.base.Method` to the documented `fedekd.methods.Method`."""
    target = str(node.get("reftarget", ""))
    if node.get("refdomain") != "py" or not target:
        return None
    name = target.rpartition(".")[2]
    documented = env.domaindata["py"]["objects"]
    candidates = [path for path in documented if path.rpartition(".")[2] == name and path.startswith("fedekd.")]
    if target.startswith("fedekd.") and candidates:
        found = min(candidates, key=len)
        entry = documented[found]
        uri = app.builder.get_relative_uri(node["refdoc"], entry.docname)
        return nodes.reference("", "", content, internal=True, refuri=f"{uri}#{entry.node_id}")
    # An internal class in a signature has no page. A name that does not exist stays a warning.
    return content if target.startswith("fedekd.") and _exists(target) else None


def _exists(path: str) -> bool:
    module, _, name = path.rpartition(".")
    try:
        return hasattr(import_module(module), name)
    except ImportError:
        return False


def setup(app: Any) -> dict[str, bool]:
    """Register both."""
    # Before napoleon (priority 500), which copies the text into fields.
    app.connect("autodoc-process-docstring", to_rst, priority=400)
    app.connect("missing-reference", resolve)
    return {"parallel_read_safe": True, "parallel_write_safe": True}

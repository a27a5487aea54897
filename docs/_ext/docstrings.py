"""Read docstrings that use `code` and $math$, and resolve names to the page that documents them."""

from __future__ import annotations

import re
from typing import Any

from docutils import nodes
from sphinx.addnodes import pending_xref

_CODE = re.compile(r"(?<![`:\w])`([^`\n]+)`(?!`)")
_MATH = re.compile(r"(?<![$\\])\$([^$\n]+)\$(?!\$)")


def to_rst(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Translate inline code and math of a docstring, in place."""
    text = "\n".join(lines)
    text = re.sub(r"^([ ]*)\$\$(.+?)\$\$", _display, text, flags=re.DOTALL | re.MULTILINE)
    text = _CODE.sub(r"``\1``", text)
    text = _MATH.sub(r":math:`\1`", text)
    lines[:] = text.split("\n")


def _display(match: re.Match[str]) -> str:
    indent, formula = match[1], " ".join(match[2].split())
    return f"\n{indent}.. math:: {formula}\n"


def resolve(app: Any, env: Any, node: pending_xref, content: nodes.TextElement) -> nodes.reference | None:
    """Resolve `fedekd.methods.base.Method` to `fedekd.methods.Method`, where it is documented."""
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
    return None


def setup(app: Any) -> dict[str, bool]:
    """Register both."""
    # Before napoleon (priority 500), which copies the text into fields.
    app.connect("autodoc-process-docstring", to_rst, priority=400)
    app.connect("missing-reference", resolve)
    return {"parallel_read_safe": True, "parallel_write_safe": True}

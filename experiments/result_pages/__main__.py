"""Render docs/results/ from results/ and docs/_templates/results/.

Run `make tables` after a change of results/ or of a template. `--check` writes nothing and exits with 1 if a committed
page differs from what is rendered.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from pathlib import Path

import jinja2

from experiments.result_pages import (
    client_exits,
    do_no_harm,
    early_exits,
    group_exits,
    hospital,
    hospital_experiments,
    monitoring,
    published_protocol,
)
from experiments.result_pages.common import ROOT

DOCS = ROOT / "docs"
TEMPLATES = DOCS / "_templates" / "results"

#: Modules whose public functions templates call by name.
MODULES = (
    client_exits,
    do_no_harm,
    early_exits,
    group_exits,
    hospital,
    hospital_experiments,
    monitoring,
    published_protocol,
)


def render() -> dict[Path, str]:
    """Return the pages by path."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        autoescape=False,  # Markdown, not HTML
    )
    for module in MODULES:
        functions = inspect.getmembers(module, inspect.isfunction)
        environment.globals |= {
            name: function for name, function in functions if function.__module__ == module.__name__ and name[0] != "_"
        }
    return {
        DOCS / "results" / name.removesuffix(".jinja"): environment.get_template(name).render()
        for name in environment.list_templates()
    }


def main(argv: Sequence[str]) -> int:
    """Write the pages; with `--check` only compare them."""
    stale = [path for path, text in render().items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    for path in stale:
        print(f"{path.relative_to(ROOT)}: {'differs' if '--check' in argv else 'written'}")
        if "--check" not in argv:
            path.parent.mkdir(exist_ok=True)
            path.write_text(render()[path], encoding="utf-8")
    return 1 if stale and "--check" in argv else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Render docs/results/ from results/ and docs/_templates/results/.

Run `make tables` after a change of results/ or of a template. `--check` writes nothing and exits with 1 if a committed
page differs from what is rendered.
"""

from __future__ import annotations

import inspect
import pkgutil
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path

import jinja2

from experiments import result_pages
from experiments.result_pages.common import ROOT

DOCS = ROOT / "docs"
TEMPLATES = DOCS / "_templates" / "results"


def functions() -> dict[str, Callable[..., str]]:
    """Return the public functions of the modules here, which templates call by name."""
    found = {}
    for each in pkgutil.iter_modules(result_pages.__path__, "experiments.result_pages."):
        if not each.name.endswith("__main__"):
            members = inspect.getmembers(import_module(each.name), inspect.isfunction)
            found |= {name: function for name, function in members if function.__module__ == each.name}
    return found


def render() -> dict[Path, str]:
    """Return the pages by path."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        autoescape=False,  # Markdown, not HTML
    )
    environment.globals |= functions()
    return {
        DOCS / "results" / name.removesuffix(".jinja"): environment.get_template(name).render()
        for name in environment.list_templates()
    }


def main(argv: Sequence[str]) -> int:
    """Write the pages; with `--check` only compare them."""
    pages = render()
    stale = [path for path, text in pages.items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    for path in stale:
        print(f"{path.relative_to(ROOT)}: {'differs' if '--check' in argv else 'written'}")
        if "--check" not in argv:
            path.parent.mkdir(exist_ok=True)
            path.write_text(pages[path], encoding="utf-8")
    return 1 if stale and "--check" in argv else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

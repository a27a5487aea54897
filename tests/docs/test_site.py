"""The documentation site: it builds without warnings and loads nothing from the network."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from documents import ROOT, documents

#: Elements that a browser loads on its own; links are for a click.
LOADED = re.compile(r'<(?:script|img|iframe|link)\b[^>]*\b(?:src|href)="(?:https?:)?//[^"]*"')


@pytest.mark.slow
def test_site_builds_without_warnings_and_loads_nothing_from_the_network(tmp_path: Path) -> None:
    pytest.importorskip("furo")
    pytest.importorskip("myst_nb")
    options = ["-W", "--keep-going", "-q", "-n", "-D", "nb_execution_mode=off"]
    command = [sys.executable, "-m", "sphinx", *options, "docs", str(tmp_path / "html"), "-d", str(tmp_path / "trees")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    pages = sorted((tmp_path / "html").rglob("*.html"))
    assert len(pages) > len(documents())
    assert {path.name: found for path in pages if (found := LOADED.findall(path.read_text(encoding="utf-8")))} == {}
    styles = [path for path in (tmp_path / "html").rglob("*.css") if "//" in re.sub(r"/\*.*?\*/", "", path.read_text())]
    assert not [path for path in styles if re.search(r"(@import|url\()\s*[\"']?https?:", path.read_text())]

"""Configuration of Sphinx. Neither the build nor the pages use the network.

The pages are MyST, that is Markdown that GitHub also renders, and the theme is Furo.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parent
sys.path[:0] = [str(DOCS / "_ext"), str(DOCS.parent)]
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the notebooks train on images of 8x8 pixels

from fedekd import __version__  # noqa: E402

project = "fedekd"
author = "The fedekd authors"
copyright = author
release = version = __version__

extensions = [
    "myst_nb",  # MyST Markdown and the notebooks
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",  # Google-style docstrings
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
    "cli_reference",
    "docstrings",
    "mathml",
]
exclude_patterns = ["_build", "_templates", "how-to/patches"]
nitpicky = True
# Only references into this package are checked: there is no network for the inventories of others.
nitpick_ignore_regex = [(r"py:.*", r"(?!fedekd\.).*")]

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
html_math_renderer = "mathml"

# The notebooks run when the site is built, once per content; `-D nb_execution_mode=off` leaves them without output.
nb_execution_mode = "cache"
nb_execution_cache_path = str(DOCS / "_build" / ".jupyter_cache")
nb_execution_timeout = 600
nb_execution_raise_on_error = True
nb_merge_streams = True

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 88
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True  # dataclass fields are documented once, by their class

html_theme = "furo"
html_title = f"fedekd {__version__}"
html_static_path = ["_static"]
html_css_files = ["fedekd.css"]
html_copy_source = False
html_show_sphinx = False
copybutton_exclude = ".linenos, .gp, .go"


def _copy_notebooks() -> None:
    """Copy notebooks/ into the source folder, where Sphinx looks for pages."""
    for path in sorted((DOCS.parent / "notebooks").glob("*.ipynb")):
        target = DOCS / "tutorials" / path.name
        if not target.is_file() or target.read_bytes() != path.read_bytes():
            shutil.copyfile(path, target)


_copy_notebooks()

"""Write the report on the FedeKD paper.

Run as `python -m experiments.fedekd_paper [RUNS ...]` or `make paper-report`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.fedekd_paper.load import load, load_grids
from experiments.fedekd_paper.report import TITLE, paper_report
from fedekd.errors import UserError
from fedekd.reporting.document import write_document


def main(argv: Sequence[str] | None = None) -> int:
    """Write the report; the exit code is 2 after an error in the input."""
    parser = argparse.ArgumentParser(prog="python -m experiments.fedekd_paper", description=__doc__)
    parser.add_argument("runs", nargs="*", default=["results"], help="folders of results (default: results)")
    parser.add_argument("--output", default="runs/paper-report", help="folder of the report (default: %(default)s)")
    parser.add_argument("--root", default="data", help="folder of the data files, for Table 3 (default: %(default)s)")
    options = parser.parse_args(argv)
    try:
        folders = [Path(name) for name in options.runs]
        introduction, sections = paper_report(load(folders), load_grids(folders), options.root, options.runs)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    folder = Path(options.output)
    write_document(TITLE, introduction, sections, folder)
    print(introduction[0])
    print(f"Report: {folder / 'index.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

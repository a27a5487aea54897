"""The paper's grid: running it, keeping its results, and holding them against the published ones."""

from fedekd.benchmark.grid import Block, Cell, cells, parse_filter, require_valid
from fedekd.benchmark.results import read_results, write_results
from fedekd.benchmark.runner import GridObserver, run_grid
from fedekd.benchmark.table import markdown_table

__all__ = [
    "Block",
    "Cell",
    "GridObserver",
    "cells",
    "markdown_table",
    "parse_filter",
    "read_results",
    "require_valid",
    "run_grid",
    "write_results",
]

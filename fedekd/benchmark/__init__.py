"""Benchmark grids: run them, keep their results, and tabulate them."""

from fedekd.benchmark.grid import Block, Cell, cells, parse_filter, require_valid
from fedekd.benchmark.results import numeric, read_results, write_results
from fedekd.benchmark.runner import GridObserver, run_grid
from fedekd.benchmark.table import method_table

__all__ = [
    "Block",
    "Cell",
    "GridObserver",
    "cells",
    "method_table",
    "numeric",
    "parse_filter",
    "read_results",
    "require_valid",
    "run_grid",
    "write_results",
]

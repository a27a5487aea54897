"""Load results, and separate the runs of the paper's grid from others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import yaml

from experiments.fedekd_paper.published import DATASETS
from fedekd.benchmark import Block, cells, numeric, read_results
from fedekd.benchmark.results import distinct_methods
from fedekd.configuration.configs import shipped_folder
from fedekd.errors import UserError
from fedekd.metrics import METRICS

_OTHER_OPTIONS = ", other options"


def load(folders: Sequence[Path]) -> pd.DataFrame:
    """Read the results of folders.

    Runs of the paper's data sets that are not part of its grid get a data set of their own, "NAME, other options".
    Several configurations with one label become one method each, since their mean would have no meaning.

    Args:
        folders: Folders with the CSV files of `benchmark`, or with such a folder `results`.

    Returns:
        One row per run with numbers in the columns of numbers, and three more columns: `order` (position of the data
        set), `higher` (direction of the metric), and `sweep` (parameter that is varied, if any).

    Raises:
        UserError: If a folder has no results, or a file is damaged.
    """
    frames = []
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder} does not exist: expected a folder with CSV files of `benchmark`.")
        frames += [read_results(folder), read_results(folder / "results")]
        if frames[-1].empty and frames[-2].empty:
            raise UserError(f"{folder}: expected CSV files of `benchmark`, got none. Run `make benchmark` first.")
    frame = numeric(pd.concat(frames).fillna(""))
    return arrange(frame[~frame.index.duplicated()], paper_runs)


def load_grids(folders: Sequence[Path]) -> list[pd.DataFrame]:
    """Read the results in subfolders, one frame per grid."""
    frames = [read_results(path) for folder in folders for path in sorted(folder.iterdir()) if path.is_dir()]
    return [arrange(numeric(frame)) for frame in frames if not frame.empty]


def arrange(frame: pd.DataFrame, runs_of: Callable[[str], frozenset[tuple[str, int]]] | None = None) -> pd.DataFrame:
    """Separate configurations and add the columns of `load`.

    Args:
        frame: One row per run.
        runs_of: Function from a data set to configurations and seeds of the paper's grid; by default all runs count as
            part of it.
    """
    frame = frame.copy()
    if runs_of is not None:
        in_paper = frame["dataset"].isin(list(DATASETS))
        known = frozenset().union(*(runs_of(name) for name in frame["dataset"][in_paper].unique()))
        is_known = [cell in known for cell in zip(frame["configuration"], frame["seed"], strict=True)]
        frame.loc[in_paper & ~np.asarray(is_known, dtype=bool), "dataset"] += _OTHER_OPTIONS
    runs = ["dataset", "alpha", "method"]
    frame = distinct_methods(frame).drop_duplicates([*runs, "seed"])
    position = {name: index for index, name in enumerate(DATASETS)}
    frame["order"] = frame["dataset"].map(position).fillna(len(position)).astype(int)
    frame["higher"] = frame["metric"].map({name: metric.higher_is_better for name, metric in METRICS.items()})
    frame["sweep"] = frame["method"].str.extract(r"^(beta|lambda_kd) ", expand=False).fillna("")
    return frame.sort_values(["order", "dataset", "alpha"], kind="stable").reset_index(drop=True)


@cache
def paper_runs(dataset: str) -> frozenset[tuple[str, int]]:
    """Return the configurations and seeds of the paper's grid for a data set."""
    blocks = yaml.safe_load((shipped_folder() / "benchmark/paper.yaml").read_text(encoding="utf-8"))["blocks"]
    grid = cells([Block(**block) for block in blocks], {"dataset": dataset}, shipped_folder())
    return frozenset((cell.configuration, cell.seed) for cell in grid)


def display_name(dataset: str) -> str:
    """Return a data set's name for tables and figures.

    Example:
        >>> display_name("cifar10"), display_name("cifar10, other options"), display_name("digits")
        ('CIFAR-10', 'CIFAR-10, other options', 'digits')
    """
    name, comma, rest = dataset.partition(", ")
    return f"{DATASETS.get(name, name)}{comma}{rest}"

"""Runs that cells of the paper lack, and the time that they would take."""

from __future__ import annotations

import math

import pandas as pd

from experiments.fedekd_paper.load import display_name
from experiments.fedekd_paper.published import CELL, SEEDS

#: Verdicts of cells without a test.
UNSETTLED = ("not run", "too few seeds")


def missing_runs(cells: pd.DataFrame, results: pd.DataFrame) -> pd.DataFrame:
    """Return what the cells without a test lack up to the seeds of the paper.

    The time of a run is the median over the rows of its data set and method; without such rows over all methods of the
    data set. Rows of CPUs, with one core each, come before those of GPUs.

    Args:
        cells: Cells with their verdicts, see `paper_cells`.
        results: As `load` returns them.

    Returns:
        One row per data set, alpha and method: `tables` (number of cells), `runs`, `device` (`CPU core` or the name of
        a GPU; empty without rows of the data set) and `hours` of all these runs (NaN without such rows).
    """
    printed = cells[cells["paper_mean"].notna() & ~cells["derived"] & cells["verdict"].isin(UNSETTLED)]
    missing = printed.assign(runs=SEEDS - printed["values"].map(len))
    missing = missing.groupby(CELL, sort=False).agg(tables=("runs", "size"), runs=("runs", "max")).reset_index()
    times = [_time_of_a_run(row["dataset"], row["method"], results) for row in missing.to_dict("records")]
    missing["device"] = [device for device, _ in times]
    missing["hours"] = missing["runs"] * [seconds / 3600 for _, seconds in times]
    return missing


def _time_of_a_run(dataset: str, method: str, results: pd.DataFrame) -> tuple[str, float]:
    """Return the device of a run, and its median seconds."""
    of_dataset = results[results["dataset"] == dataset]
    for rows in (of_dataset[of_dataset["method"] == method], of_dataset):
        is_cpu = rows["device"] == "cpu"
        if is_cpu.any():
            return "CPU core", rows.loc[is_cpu, "seconds"].median()
        if len(rows):
            return rows["device"].mode()[0], rows["seconds"].median()
    return "", math.nan


def runs_text(runs: float, device: str, hours: float) -> str:
    """Return what a cell would take, in words.

    Example:
        >>> runs_text(8, "CPU core", 1.54), runs_text(10, "", math.nan)
        ('takes 8 runs, 1.5 h on one CPU core', 'takes 10 runs')
    """
    return f"takes {runs:g} runs" + (f", {_duration(hours)} on one {device}" if device else "")


def _duration(hours: float) -> str:
    return f"{hours:.1f} h" if hours >= 1 else f"{math.ceil(hours * 60)} min"


def missing_table(missing: pd.DataFrame) -> pd.DataFrame:
    """Return cells, runs and the time of these runs by data set and device."""
    totals = missing.groupby(["dataset", "device"], sort=False)[["tables", "runs", "hours"]].sum().reset_index()
    return pd.DataFrame(
        {
            "data set": totals["dataset"].map(display_name),
            "cells": totals["tables"],
            "runs": totals["runs"],
            "time": [
                f"{_duration(hours)} on one {device}" if device else "not measured"
                for device, hours in zip(totals["device"], totals["hours"], strict=True)
            ],
        }
    )

"""Paired comparisons and rankings of methods, and the effect of the gate."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from experiments.fedekd_paper.load import display_name
from experiments.fedekd_paper.statistics import LEVEL, MIN_PAIRS, Ranking, holm, rank, signed_rank
from experiments.fedekd_paper.tables import p_text

#: Compared quantities by column of the results.
COMPARED = {"delta_avg": "average Delta", "delta_worst": "worst Delta"}

#: FedeKD and the two controls of its gate: weights permuted within each batch, and full trust.
GATED, SHUFFLED, UNGATED = "FedeKD", "Shuffled gate", "No gating"

COLUMNS = ["dataset", "alpha", "measure", "first", "second", "pairs", "difference", "p", "p_holm", "favours", "gain"]


def compare(results: pd.DataFrame, pairs: Iterable[tuple[str, str]], family: Sequence[str]) -> pd.DataFrame:
    """Compare pairs of methods over the seeds that both have.

    Args:
        results: As `load` returns them.
        pairs: First and second method.
        family: Columns of the result; tests that agree in them are one family for Holm's adjustment.

    Returns:
        One row per data set, alpha, measure and pair with at least one common seed: number of pairs, mean difference
        (first minus second), p (NaN if there is no test), p_holm, the favoured method, and the gain of the first method
        (positive where it is better).
    """
    runs = results.set_index(["order", "dataset", "higher", "alpha", "seed"])
    rows = []
    for first, second in pairs:
        for measure in COMPARED:
            one, other = (runs.loc[runs["method"] == name, measure] for name in (first, second))
            one, other = one.align(other, join="inner")
            for (order, dataset, higher, alpha), group in (one - other).groupby(level=[0, 1, 2, 3]):
                values = group.sort_index().tolist()
                difference = math.fsum(values) / len(values)
                gain = difference if higher else -difference
                favours = first if gain > 0 else second if gain < 0 else "neither"
                row = dataset, alpha, measure, first, second, len(values), difference, signed_rank(values)
                rows.append((order, *row, favours, gain))
    frame = pd.DataFrame(rows, columns=["order", *(name for name in COLUMNS if name != "p_holm")])
    frame["p_holm"] = np.nan
    for _, tests in frame.groupby(list(family)):
        frame.loc[tests.index, "p_holm"] = holm(tests["p"].tolist())
    return frame.sort_values(["order", "dataset", "alpha", "measure"], kind="stable")[COLUMNS]


def method_comparisons(results: pd.DataFrame) -> pd.DataFrame:
    """Compare FedeKD with the other methods.

    Tests with the same data set, alpha and measure are one family.
    """
    others = results.loc[results["sweep"] == "", "method"].unique()
    pairs = [(GATED, name) for name in others if name not in (GATED, SHUFFLED, UNGATED, "Local")]
    return compare(results, pairs, ["dataset", "alpha", "measure"])


def gate_comparisons(results: pd.DataFrame) -> pd.DataFrame:
    """Compare the gate, its permuted weights and full trust.

    Tests with the same pair and measure are one family.
    """
    pairs = [(SHUFFLED, UNGATED), (GATED, SHUFFLED), (GATED, UNGATED)]
    return compare(results, pairs, ["first", "second", "measure"])


def comparison_table(comparisons: pd.DataFrame) -> pd.DataFrame:
    """Return comparisons as printed cells."""
    return pd.DataFrame(
        {
            "data set": comparisons["dataset"].map(display_name),
            "alpha": comparisons["alpha"],
            "measure": comparisons["measure"].map(COMPARED),
            "first minus second": comparisons["first"] + " minus " + comparisons["second"],
            "pairs": comparisons["pairs"],
            "difference": comparisons["difference"].map("{:+.4f}".format),
            "p": comparisons["p"].map(p_text),
            "adjusted": comparisons["p_holm"].map(p_text),
            "favours": comparisons["favours"],
        }
    )


def gate_finding(comparisons: pd.DataFrame) -> list[str]:
    """Return whether the gate's ranking matters, as paragraphs.

    Args:
        comparisons: As `gate_comparisons` returns them.
    """
    tested = comparisons[comparisons["p"].notna()]
    ranking = tested[(tested["first"] == GATED) & (tested["second"] == SHUFFLED)]
    if ranking.empty:
        return [f"No test: at least {MIN_PAIRS} seeds of FedeKD with its gate and with permuted weights are needed."]
    return [
        "Compared with full trust, the gate lowers the weight of all samples and ranks the samples of a batch."
        " Permuting the weights within each batch (Shuffled gate) keeps the first effect and removes the"
        " second. The value of the ranking is the gain of the gate over the permuted weights.",
        *(_answer(ranking[ranking["measure"] == measure], name) for measure, name in COMPARED.items()),
    ]


def _answer(ranking: pd.DataFrame, measure: str) -> str:
    settings = f"{len(ranking)} setting{'s' if len(ranking) > 1 else ''}"
    clear = ranking[ranking["p_holm"] <= LEVEL]
    if len(clear):
        names = ", ".join(clear["dataset"].map(display_name).unique())
        return (
            f"{measure[0].upper()}{measure[1:]}: significant in {len(clear)} of {settings} (Holm, {LEVEL:g}), better in"
            f" {(clear['gain'] > 0).sum()} of them ({names})."
        )
    # The smallest p of n pairs is 2 / 2^n; Holm multiplies it by the number of tests.
    if (2.0 ** (1 - ranking["pairs"])).min() * len(ranking) > LEVEL:
        return f"{measure[0].upper()}{measure[1:]}: too few seeds for a significant result in {settings}."
    return f"{measure[0].upper()}{measure[1:]}: no significant difference in {settings}."


class Standing(NamedTuple):
    """A ranking of the methods of a data set.

    Attributes:
        dataset: Data set.
        measure: Ranked quantity, a column of the results.
        ranking: The ranking, which includes Local.
        alphas: Values of alpha over which it is made.
        omitted: Methods that share too few runs with the others.
    """

    dataset: str
    measure: str
    ranking: Ranking
    alphas: list[float]
    omitted: list[str]


def standings(results: pd.DataFrame) -> list[Standing]:
    """Rank the methods of each data set over (alpha, seed), by each measure."""
    found = []
    methods = results[(results["sweep"] == "") & (results["method"] != "Local")]
    for (_, dataset, higher), runs in methods.groupby(["order", "dataset", "higher"]):
        for measure in COMPARED:
            wide = runs.pivot(index=["alpha", "seed"], columns="method", values=measure)
            ranked, common = _with_common_runs(wide.notna())
            if len(ranked) >= 2:
                wide = wide.loc[common]
                # Delta of Local is zero by definition.
                scores = {name: wide[name].tolist() for name in ranked} | {"Local": [0.0] * len(wide)}
                alphas = sorted(wide.index.unique("alpha"))
                omitted = [name for name in runs["method"].unique() if name not in ranked]
                found.append(Standing(str(dataset), measure, rank(scores, bool(higher)), alphas, omitted))
    return found


def _with_common_runs(has_run: pd.DataFrame) -> tuple[list[str], pd.Series]:
    """Select methods that have at least `MIN_PAIRS` runs in common.

    Methods are added one by one, the one with most common runs first.
    """
    chosen: list[str] = []
    common = pd.Series(True, index=has_run.index)
    waiting = sorted(has_run.columns, key=lambda name: -has_run[name].sum())
    while waiting:
        name = max(waiting, key=lambda name: (common & has_run[name]).sum())
        if (common & has_run[name]).sum() < MIN_PAIRS:
            break
        waiting.remove(name)
        chosen.append(name)
        common &= has_run[name]
    return [name for name in has_run.columns if name in chosen], common


def sweep_values(results: pd.DataFrame, parameter: str, alpha: float = 0.5) -> dict[str, pd.DataFrame]:
    """Return the average Delta over the values of a parameter, as in Figures 3 and 4.

    Args:
        results: As `load` returns them.
        parameter: `beta` or `lambda_kd`. FedeKD itself is the value 1, the default of both.
        alpha: Concentration of the partition.

    Returns:
        By data set, a frame with one row per seed and one column per value; only seeds that all values have, so that
        neighbouring means are over the same partitions.
    """
    runs = results[(results["alpha"] == alpha) & ((results["sweep"] == parameter) | (results["method"] == GATED))]
    labels = runs["method"].where(runs["method"] != GATED, f"{parameter} 1").str.removeprefix(f"{parameter} ")
    runs = runs.assign(value=pd.to_numeric(labels, errors="coerce")).dropna(subset=["value"])
    frames = {
        str(dataset): group.pivot(index="seed", columns="value", values="delta_avg").dropna()
        for (_, dataset), group in runs.groupby(["order", "dataset"])
    }
    return {dataset: frame for dataset, frame in frames.items() if frame.shape[1] > 1 and len(frame)}

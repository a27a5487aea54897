"""Tables of methods and gates by the protocol of the FedeKD paper."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import pandas as pd

from experiments.fedekd_paper.load import load
from experiments.fedekd_paper.missing import missing_runs, missing_table
from experiments.fedekd_paper.published import DATASETS
from experiments.fedekd_paper.statistics import LEVEL, holm, signed_rank
from experiments.fedekd_paper.tables import counts, paper_cells
from experiments.result_pages.common import FIGURES, RESULTS, markdown, read, spread
from fedekd.metrics import METRICS

DELTAS = {"delta_avg": "average", "delta_worst": "worst client"}


def methods(dataset: str) -> str:
    """One row per alpha and method, best mean Delta first; Local is in each run."""
    frame = read(f"{dataset}.csv")
    frame = frame[frame["parameter"].isna()]
    sign = 1 if METRICS[frame["metric"].iloc[0]].higher_is_better else -1
    local = frame.drop_duplicates(["alpha", "seed"])
    local = local.assign(method="Local", mean=local["local_mean"], delta_avg=0.0, delta_worst=0.0, delta_tail=0.0)
    rows = []
    for alpha, at_alpha in pd.concat([frame, local]).groupby("alpha", sort=True):
        groups = {name: group for name, group in at_alpha.groupby("method", sort=False)}
        for name in sorted(groups, key=lambda name: -sign * groups[name]["delta_avg"].mean()):
            group = groups[name]
            cells = [spread(group[column], column != "mean") for column in FIGURES]
            if name == "Local":
                cells[1:] = ["0"] * 3
            head = [f"{dataset}, {group['metric'].iloc[0]}", f"{alpha:g}", name]
            rows.append([*head, *cells, str(len(group))])
    return markdown(["data set", "alpha", "method", *FIGURES.values(), "seeds"], rows)


def sweep(parameter: str, default: float = 1.0, alpha: float = 0.5) -> str:
    """Average Delta by value of a parameter, over the seeds that all values have."""
    table: dict[str, pd.Series] = {}
    columns: set[float] = set()
    for dataset in ("retinamnist", "digits"):
        frame = read(f"{dataset}.csv")
        frame = frame[frame["alpha"] == alpha]
        at_default = frame[frame["method"] == "FedeKD"].assign(value=default)
        swept = pd.concat([frame[frame["parameter"] == parameter], at_default])
        wide = swept.pivot(index="seed", columns="value", values="delta_avg").dropna()
        table[f"{dataset}, {frame['metric'].iloc[0]}"] = wide
        columns |= set(wide.columns)
    values = sorted(columns)
    rows = [
        [name, *(spread(wide[value], True) if value in wide else "" for value in values), str(len(wide))]
        for name, wide in table.items()
    ]
    return markdown([f"average Delta at alpha {alpha}", *(f"{parameter} {v:g}" for v in values), "seeds"], rows)


def _paired(first: pd.DataFrame, second: pd.DataFrame, column: str) -> tuple[int, float, float]:
    """Pairs, mean difference, and the two-sided p of Wilcoxon's signed-rank test."""
    both = first.set_index("seed")[column].align(second.set_index("seed")[column], join="inner")
    difference = both[0] - both[1]
    return len(difference), float(difference.mean()), signed_rank(difference.tolist())


def gate() -> str:
    """The gate against its two controls: shuffled weights, and no gate."""
    steps = (("Shuffled gate", "No gating"), ("FedeKD", "Shuffled gate"))
    found: dict[tuple[str, float], dict[tuple[str, str], list[Any]]] = {}
    for first, second in steps:
        for column in DELTAS:
            family = []
            for dataset in DATASETS:
                if not (RESULTS / f"{dataset}.csv").is_file():
                    continue
                frame = read(f"{dataset}.csv")
                sign = 1 if METRICS[frame["metric"].iloc[0]].higher_is_better else -1
                for alpha, at_alpha in frame.groupby("alpha"):
                    one, other = (at_alpha[at_alpha["method"] == name] for name in (first, second))
                    pairs, difference, p = _paired(one, other, column)
                    if not math.isnan(p):
                        family.append([(dataset, alpha), pairs, sign * difference, p])
            for entry, adjusted in zip(family, holm([entry[3] for entry in family]), strict=True):
                found.setdefault(entry[0], {})[first, column] = [*entry[1:], adjusted]
    rows = []
    for (dataset, alpha), cells in found.items():
        for column, name in DELTAS.items():
            row = [f"{DATASETS[dataset]}, {alpha:g}", name]
            pairs = 0
            for first, _ in steps:
                if (first, column) not in cells:  # too few seeds
                    row.append("")
                    continue
                pairs, gain, p, adjusted = cells[first, column]
                row.append(f"{gain:+.4f} (p = {p:.2g}{'*' if adjusted <= LEVEL else ''})")
            rows.append([*row, str(pairs)])
    return markdown(["data set, alpha", "Delta", "shuffled − none", "gate − shuffled", "seeds"], rows)


def verdicts() -> str:
    """How many of the paper's cells agree with ours, by Welch's t-test at 5%.

    Of those that differ, how many are marked as faulty.
    """
    cells, _ = _paper()
    number = counts(cells)
    faulty = int((cells["verdict"].eq("differs") & cells["fault"].ne("")).sum())
    words = {"agrees": "agree", "differs": "differ", "too few seeds": "have too few seeds", "not run": "were not run"}
    notes = {"differs": f" (of which {faulty} are of the kinds below)"}
    return ", ".join(f"{number.get(name, 0)} {text}{notes.get(name, '')}" for name, text in words.items())


def missing() -> str:
    """The runs without which cells have no test, by data set."""
    table = missing_table(missing_runs(*_paper()))
    return markdown(list(table), [[str(value) for value in row] for row in table.itertuples(index=False)])


@cache
def _paper() -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the cells of the paper, and the rows that they are compared with."""
    results = load([RESULTS])
    return paper_cells(results), results

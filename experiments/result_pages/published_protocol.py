"""Tables of methods and gates by the protocol of the FedeKD paper."""

from __future__ import annotations

from typing import Any

import pandas as pd
from scipy.stats import ttest_ind_from_stats, wilcoxon

from experiments.result_pages.common import (
    DATASETS,
    FIGURES,
    LEVEL,
    MIN_SEEDS,
    RESULTS,
    ROOT,
    holm,
    markdown,
    read,
    spread,
)
from fedekd.metrics import METRICS

DELTAS = {"delta_avg": "average", "delta_worst": "worst client"}

#: Fewest pairs for Wilcoxon's test: with five pairs its smallest two-sided p is 2 / 2^5 = 0.0625.
MIN_PAIRS = 6

#: Seeds behind each cell of the FedeKD paper (Appendix H).
PAPER_SEEDS = 10


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


def _paired(first: pd.DataFrame, second: pd.DataFrame, column: str) -> tuple[int, float, float | None]:
    """Pairs, mean difference, and the two-sided p of Wilcoxon's signed-rank test."""
    both = first.set_index("seed")[column].align(second.set_index("seed")[column], join="inner")
    difference = both[0] - both[1]
    if len(difference) < MIN_PAIRS:
        return len(difference), float(difference.mean()), None
    return len(difference), float(difference.mean()), float(wilcoxon(difference, zero_method="zsplit").pvalue)


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
                    if p is not None:
                        family.append([(dataset, alpha), pairs, sign * difference, p])
            for entry, adjusted in zip(family, holm([entry[3] for entry in family]), strict=True):
                found.setdefault(entry[0], {})[first, column] = [*entry[1:], adjusted]
    rows = []
    for (dataset, alpha), cells in found.items():
        for column, name in DELTAS.items():
            row = [f"{DATASETS[dataset]}, {alpha:g}", name]
            for first, _ in steps:
                _, gain, p, adjusted = cells[first, column]
                row.append(f"{gain:+.4f} (p = {p:.2g}{'*' if adjusted <= LEVEL else ''})")
            rows.append([*row, str(cells[first, column][0])])
    return markdown(["data set, alpha", "Delta", "shuffled − none", "gate − shuffled", "seeds"], rows)


#: (aggregation, method) of the paper's rows, and our labels.
PUBLISHED_METHODS = {
    ("FedDyn", "-"): "FedDyn",
    ("FedProx", "-"): "FedProx",
    ("FedProx", "FedType"): "FedType, FedProx",
    ("FedAvg", "-"): "FedAvg",
    ("FedAvg", "FedType"): "FedType",
    ("FedAvg", "FedeKD"): "FedeKD",
    ("FedAvg", "No Gating"): "No gating",
    ("FedAvg", "ENTROPY"): "Entropy",
    ("FedAvg", "MARGIN"): "Margin",
    ("FedAvg", "LSE"): "LogSumExp",
    ("FedAvg", "FEAT"): "Feature",
}
PUBLISHED_MEASURES = {
    "avg_delta": "delta_avg",
    "worst_delta": "delta_worst",
    "p10_delta": "delta_tail",
    "p90_delta": "delta_tail",
    "mean_accuracy": "mean",
    "mean_rmse": "mean",
}


def verdicts() -> str:
    """How many of the paper's cells agree with ours, by Welch's t-test at 5%."""
    published = ROOT / "experiments" / "fedekd_paper" / "published.csv"
    names = {name.replace(" ", ""): key for key, name in DATASETS.items()}
    counts = {"agree": 0, "differ": 0, "have too few seeds": 0, "were not run": 0}
    for cell in pd.read_csv(published).itertuples():
        path = RESULTS / f"{names[cell.dataset]}.csv"
        values = pd.Series(dtype=float)
        if path.is_file():
            frame = read(path.name)
            chosen = frame["method"] == PUBLISHED_METHODS[cell.aggregation, cell.method]
            values = frame.loc[chosen & (frame["alpha"] == cell.alpha), PUBLISHED_MEASURES[cell.metric]]
        if values.empty:
            counts["were not run"] += 1
        elif len(values) < MIN_SEEDS:
            counts["have too few seeds"] += 1
        else:
            ours = values.mean(), values.std(), len(values)
            p = ttest_ind_from_stats(*ours, cell.mean, cell.std, PAPER_SEEDS, equal_var=False).pvalue
            counts["agree" if p > LEVEL else "differ"] += 1
    return ", ".join(f"{count} {name}" for name, count in counts.items())

"""Render docs/results/ from results/ and docs/_templates/results/.

Run `make tables` after a change of results/ or of a template. `--check` writes nothing and exits with 1 if a committed
page differs from what is rendered.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from itertools import combinations, product
from pathlib import Path
from statistics import fmean
from typing import Any

import jinja2
import pandas as pd
from scipy.stats import binomtest, ttest_ind_from_stats, ttest_rel, wilcoxon

from fedekd.do_no_harm.rule import DoNoHarm
from fedekd.metrics import METRICS, MetricSpec

DOCS = Path(__file__).resolve().parent
RESULTS = DOCS.parent / "results"
TEMPLATES = DOCS / "_templates" / "results"

#: Data sets in the order of the paper, with their display names.
DATASETS = {
    "fashionmnist": "FashionMNIST",
    "cifar10": "CIFAR-10",
    "octmnist": "OCTMNIST",
    "organamnist": "OrganAMNIST",
    "retinamnist": "RetinaMNIST",
    "diabetic_retinopathy": "Diabetic Retinopathy",
    "digits": "digits",
}
#: Column of the results, and its head in the tables.
FIGURES = {"mean": "score", "delta_avg": "Delta avg", "delta_worst": "Delta worst", "delta_tail": "Delta P10/P90"}
DELTAS = {"delta_avg": "average", "delta_worst": "worst client"}
MARGINS = (0.0, 0.005, 0.01, 0.02)
BUDGETS = (25, 50, 75)
LEVEL = 0.05
#: Gain in test accuracy that a rule should find.
LARGE_GAIN = 0.05
#: Fewest pairs for Wilcoxon's test: with five pairs its smallest two-sided p is 2 / 2^5 = 0.0625.
MIN_PAIRS = 6
MIN_SEEDS = 3
#: Seeds behind each cell of the FedeKD paper (Appendix H).
PAPER_SEEDS = 10


# ---------------------------------------------------------------- reading and formatting


@cache
def read(path: str) -> pd.DataFrame:
    """Read a CSV file below results/; columns `parameter` and `value` mark sweeps."""
    frame = pd.read_csv(RESULTS / path)
    if "method" in frame:
        sweep = frame["method"].str.extract(r"^(beta|lambda_kd) ([\d.]+)$")
        frame["parameter"], frame["value"] = sweep[0], sweep[1].astype(float)
        if frame.duplicated(["method", "dataset", "alpha", "seed"]).any():
            raise ValueError(f"{path}: two rows of one method, alpha and seed")
    return frame


def minus(text: str) -> str:
    """Use the minus sign in place of the hyphen before a number."""
    return text.replace("-", "−")


def spread(values: Iterable[float], signed: bool) -> str:
    """Mean ± sample standard deviation; of one value only the value."""
    series = pd.Series(list(values), dtype=float)
    mean = f"{series.mean():{'+' if signed else ''}.4f}"
    return f"{mean} ± {series.std():.4f}" if len(series) > 1 else mean


def markdown(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# ---------------------------------------------------------------- methods, sweeps, the gate


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


def _holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment."""
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted


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
            for entry, adjusted in zip(family, _holm([entry[3] for entry in family]), strict=True):
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


# ---------------------------------------------------------------- natural sites


def natural_sites(federation: str) -> str:
    """Scores and Delta of each site, and of the mean and the worst of a run's sites."""
    frame = pd.read_csv(RESULTS / "natural_sites/sites.csv")
    frame = frame[frame["federation"] == federation]
    methods = sorted(frame["method"].unique())
    rows = []
    for metric, of_metric in frame.groupby("metric", sort=False):
        worst = min if METRICS[metric].higher_is_better else max
        for site, of_site in of_metric.groupby("site", sort=False):
            wide = of_site.pivot(index="seed", columns="method", values=["score", "local", "delta"])
            scores = [wide["local"][methods[0]], *(wide["score"][method] for method in methods)]
            defined = f"{scores[0].notna().sum()}"
            cells = [spread(values.dropna(), False) for values in scores]
            deltas = [spread(wide["delta"][method].dropna(), True) for method in methods]
            rows.append([site, metric, *cells, *deltas, defined])
        for title, combine in (("mean of sites", fmean), ("worst site", worst)):
            deltas = []
            for method in methods:
                of_method = of_metric[of_metric["method"] == method].dropna(subset="delta")
                deltas.append(spread(of_method.groupby("seed")["delta"].agg(combine), True))
            rows.append([f"*{title}*", metric, *[""] * (len(methods) + 1), *deltas, str(frame["seed"].nunique())])
    heads = ["site", "metric", "Local", *methods, *(f"Delta {method}" for method in methods), "seeds"]
    return markdown(heads, rows)


# ---------------------------------------------------------------- hospital scale


#: Rows of references in the runs of a method: label, method whose rows have it, prefix of the columns.
REFERENCE_ROWS = (("control of ProxyEnsemble", "ProxyEnsemble", "control"), ("Local, tuned", "Local", "tuned"))


#: Settings of the page: title, name of the results file, alpha (None for sites), end of the labels.
HOSPITAL_SETTINGS = (
    ("CIFAR-10, alpha 0.1", "cifar10", 0.1, ""),
    ("CIFAR-10, alpha 0.5", "cifar10", 0.5, ""),
    ("CIFAR-10, alpha 0.1, 20 clients", "cifar10", 0.1, ", 20 clients"),
    ("FashionMNIST, alpha 0.1", "fashionmnist", 0.1, ""),
    ("FashionMNIST, alpha 0.5", "fashionmnist", 0.5, ""),
    ("RetinaMNIST, alpha 0.1", "retinamnist", 0.1, ""),
    ("RetinaMNIST, alpha 0.5", "retinamnist", 0.5, ""),
    ("four hospitals", "heart_disease", None, ""),
    ("three sources of digits", "digits3_16", None, ""),
    ("four domains", "pacs_32", None, ""),
)


def _hospital_groups(
    dataset: str, alpha: float | None, suffix: str
) -> tuple[MetricSpec, dict[str, pd.DataFrame]] | None:
    """Rows by method and seed, best mean Delta first; None without rows."""
    path = RESULTS / "hospital" / f"{dataset}.csv"
    if not path.is_file():
        return None
    frame = pd.read_csv(path)
    frame = frame[frame["alpha"].isna() if alpha is None else frame["alpha"] == alpha]
    frame = frame[frame["method"].str.endswith(suffix) if suffix else ~frame["method"].str.contains(", ")]
    frame = frame.assign(method=frame["method"].str.removesuffix(suffix))
    if not len(frame):
        return None
    metric = METRICS[frame["metric"].iloc[0]]
    groups = {name: group.set_index("seed") for name, group in frame.groupby("method", sort=False)}
    for label, method, prefix in REFERENCE_ROWS:
        if method in groups and f"{prefix}_mean" in frame:
            group = groups[method].dropna(subset=f"{prefix}_mean")
            columns = {"mean": group[f"{prefix}_mean"]}
            columns |= {f"delta_{part}": group[f"{prefix}_delta_{part}"] for part in ("avg", "worst", "tail")}
            groups[label] = pd.DataFrame(columns)
    local = frame.drop_duplicates("seed").set_index("seed")
    groups["Local"] = pd.DataFrame({"mean": local["local_mean"], **dict.fromkeys(list(FIGURES)[1:], 0.0)})
    sign = 1 if metric.higher_is_better else -1
    return metric, dict(sorted(groups.items(), key=lambda item: -sign * item[1]["delta_avg"].mean()))


def hospital(dataset: str, alpha: float | None = None, suffix: str = "") -> str:
    """One row per method, best mean Delta first; p-values are Holm-adjusted.

    Args:
        dataset: Name of the results file.
        alpha: Concentration; None for sites.
        suffix: End of the labels, such as `, 20 clients`; removed from them.
    """
    found = _hospital_groups(dataset, alpha, suffix)
    if found is None:
        return "*Not measured yet.*"
    metric, groups = found
    rows = []
    for name, group in groups.items():
        cells = [spread(group[column], column != "mean") for column in FIGURES]
        if name == "Local":
            cells[1:] = ["0"] * 3
        for column, signed in (("surplus_avg", True), ("deployed_delta_worst", True)):
            values = group[column].dropna() if column in group else []
            cells.append(spread(values, signed) if len(values) else "")
        sent = group["bytes_up"].mean() / 1e6 if "bytes_up" in group else 0.0
        seconds = f"{group['seconds'].mean():.0f}" if "seconds" in group else ""
        cells += [f"{sent:.1f}" if sent else "0", seconds]
        rows.append([name, *cells, "", str(len(group))])
    best = groups.get("ProxyEnsemble")
    p_values = {row[0]: _paired_t(best, groups[row[0]]) for row in rows if row[0] != "ProxyEnsemble"}
    tested = [name for name, p in p_values.items() if p is not None]
    for name, p in zip(tested, _holm([p_values[name] or 0.0 for name in tested]), strict=True):
        next(row for row in rows if row[0] == name)[-2] = f"{p:.2g}"
    heads = ["method", *FIGURES.values(), "surplus avg", "worst, do no harm", "MB sent", "seconds", "p", "seeds"]
    return f"Metric: {metric.name}.\n\n" + markdown(heads, rows)


def hospital_summary() -> str:
    """One row per measured setting: ProxyEnsemble, and the best other method."""
    rows = []
    for title, *setting in HOSPITAL_SETTINGS:
        found = _hospital_groups(*setting)
        if found is None or "ProxyEnsemble" not in found[1] or len(found[1]) < len(REFERENCE_ROWS) + 3:
            continue  # only Local, the references and ProxyEnsemble are no comparison
        metric, groups = found
        best = groups["ProxyEnsemble"]
        other = next(name for name in groups if name not in ("ProxyEnsemble", REFERENCE_ROWS[0][0]))
        gains = [spread(best[column], True) for column in ("delta_avg", "delta_worst", "surplus_avg")]
        p = _paired_t(best, groups[other])
        rival = [other, spread(groups[other]["delta_avg"], True), "" if p is None else f"{p:.2g}"]
        rows.append([title, metric.name, *gains, *rival, str(len(best))])
    if not rows:
        return "*Not measured yet.*"
    heads = ["setting", "metric", "Delta avg", "Delta worst", "surplus avg", "best other", "its Delta avg", "p"]
    return markdown([*heads, "seeds"], rows)


def proxies(folder: str, labels: Mapping[str, str]) -> str:
    """One row per data set, alpha and variant of ProxyEnsemble.

    Args:
        folder: Folder in results/.
        labels: Label of a method in the rows, and in the table.
    """
    files = sorted((RESULTS / folder).glob("*.csv"))
    empty = pd.DataFrame(columns=["method", "dataset", "alpha"])
    frame = pd.concat([pd.read_csv(path) for path in files]) if files else empty
    frame = frame[frame["method"].isin(labels)]
    # Only the settings in which a variant was measured.
    measured = frame.loc[frame["method"] != "ProxyEnsemble", ["dataset", "alpha"]].drop_duplicates()
    if not len(measured):
        return "*Not measured yet.*"
    rows = []
    for dataset, alpha in measured.sort_values(["dataset", "alpha"]).itertuples(index=False):
        at_setting = frame[(frame["dataset"] == dataset) & (frame["alpha"] == alpha)]
        for label, title in labels.items():
            group = at_setting[at_setting["method"] == label]
            if len(group):
                scores = [spread(group[column], False) for column in ("local_mean", "control_mean", "mean")]
                gains = [spread(group[column], True) for column in ("delta_avg", "delta_worst", "surplus_avg")]
                sent = f"{group['bytes_up'].mean() / 1e6:.1f}"
                rows.append([dataset, f"{alpha:g}", title, *scores, *gains, sent, str(len(group))])
    heads = ["data set", "alpha", "ProxyEnsemble", "Local", "control", "score"]
    return markdown([*heads, "Delta avg", "Delta worst", "surplus avg", "MB sent", "seeds"], rows)


def _paired_t(first: pd.DataFrame | None, second: pd.DataFrame) -> float | None:
    """Compute the two-sided p of the paired t-test of Delta avg over common seeds.

    None for too few.
    """
    if first is None:
        return None
    one, other = first["delta_avg"].align(second["delta_avg"], join="inner")
    return float(ttest_rel(one, other).pvalue) if len(one) >= MIN_SEEDS else None


# ---------------------------------------------------------------- the published tables


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
    published = next(DOCS.parent.glob("*/**/published.csv"))
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


# ---------------------------------------------------------------- early exits of one site


def exits(dataset: str) -> str:
    """Accuracy per exit, of the distilled network and of the one trained on labels."""
    frame = read(f"exits/{dataset}/exits.csv")
    first = frame[frame["network"] == frame["network"].iloc[0]]
    heads = [f"exit {row.exit} ({row.cost:.0%} of the FLOPs)" for row in first.itertuples()]
    rows = [
        [network, *(f"{accuracy:.4f}" for accuracy in group["accuracy"]), f"{group['area'].iloc[0]:.4f}"]
        for network, group in frame.groupby("network", sort=False)
    ]
    return markdown(["network", *heads, "area under accuracy against cost"], rows)


def policies(dataset: str) -> str:
    """Calibrated policies on the test split, one row per target risk."""
    frame = read(f"exits/{dataset}/policies.csv")
    times = [column for column in frame if column.startswith("time ratio, ")]
    rows = []
    for row in frame.to_dict("records"):
        worst = row["worst risk"]
        rows.append(
            [
                f"{row['target risk']:g}",
                f"{row['early exits']:.1%}",
                "" if math.isnan(worst) else f"{worst:.4f}",
                f"{row['FLOPs saved']:.1%}",
                minus(f"{row['accuracy']:.4f} ({row['accuracy change']:+.4f})"),
                *(f"{row[column]:.2f}" for column in times),
            ]
        )
    heads = ["target risk", "exit early", "highest risk of an exit", "FLOPs saved", "accuracy (change)"]
    return markdown([*heads, *(column.replace("time ratio", "time") for column in times)], rows)


def validity(dataset: str) -> str:
    """Share of draws in which a calibration rule violates its target risk."""
    frame = read(f"exits/{dataset}/validity.csv")
    risks = list(dict.fromkeys(frame["target risk"]))
    rows = []
    for mode, group in frame.groupby("rule", sort=False):
        shares = group[["violation rate", "CI low", "CI high"]].itertuples(index=False)
        cells = [f"{share:.3f} ({low:.3f} to {high:.3f})" for share, low, high in shares]
        rows.append([f"`{mode}`", *cells, str(group["draws"].iloc[0])])
    return markdown(["mode", *(f"target risk {risk:g}" for risk in risks), "draws"], rows)


EXIT_SETTING = ["dataset", "model", "samples", "epochs"]


def _exit_seeds(file: str) -> Iterable[tuple[list[str], pd.DataFrame]]:
    """Yield labels and rows of each setting and method, Local last.

    Without a file there are none.
    """
    path = RESULTS / "exits_seeds" / f"{file}.csv"
    if not path.is_file():
        return
    frame = pd.read_csv(path)
    frame["is_local"] = frame["method"] == "Local"
    for values, group in frame.groupby([*EXIT_SETTING, "is_local", "method"]):
        dataset, model, samples, epochs, _, method = values
        name = f"{DATASETS.get(dataset, dataset)}, {samples:,} images" if samples else DATASETS.get(dataset, dataset)
        yield [name, f"{str(model).rpartition('.')[2]}, {epochs} epochs", method], group


def _values(values: pd.Series, digits: int = 4, sign: str = "") -> str:
    """Mean ± sample standard deviation over the seeds that have a value."""
    values = values.dropna()
    if not len(values):
        return ""
    deviation = f" ± {values.std():.{digits}f}" if len(values) > 1 else ""
    return minus(f"{values.mean():{sign}.{digits}f}") + deviation


def exit_savings() -> str:
    """Area, largest saving within a loss of accuracy, and time, over seeds."""
    rows = []
    for labels, group in _exit_seeds("networks"):
        cells = [_values(group["area"])]
        for loss in ("0.0", "0.5"):
            saved, change = 100 * group[f"saved_{loss}"], 100 * group[f"change_{loss}"]
            cells += [_values(saved, 1), _values(change, 2, "+")]
        times = [_values(group[f"time_{size}"], 2) if f"time_{size}" in group else "" for size in (1, 32, 256)]
        rows.append([*labels, *cells, *times, str(len(group))])
    heads = ["data set", "network", "method", "area", "saved, % (loss 0)", "change", "saved, % (loss 0.5)", "change"]
    heads += [*(f"time, batch {size}" for size in (1, 32, 256)), "seeds"]
    return markdown(heads, rows) if rows else "*Not measured yet.*"


def exit_calibration() -> str:
    """Accuracy and calibration error per exit, before and after scaling, over seeds."""
    rows = []
    for labels, group in _exit_seeds("exits"):
        for number, part in group.groupby("exit"):
            errors = [part[name] for name in ("ece", "scaled_ece", "exiting_ece", "scaled_exiting_ece")]
            cells = [_values(part["accuracy"]), _values(part["temperature"], 2), *map(_values, errors)]
            rows.append([*labels, str(number), *cells, str(len(part))])
    heads = ["data set", "network", "method", "exit", "accuracy", "temperature", "ECE", "ECE, scaled"]
    heads += ["ECE of exiting images", "the same, scaled", "seeds"]
    return markdown(heads, rows) if rows else "*Not measured yet.*"


def exit_corruptions() -> str:
    """Excess risk under corruptions and recalibrated figures, over seeds."""
    rows = []
    for labels, group in _exit_seeds("corruptions"):
        for severity, part in group.groupby("severity"):
            means = part.groupby("seed")[["full_accuracy", "excess_risk", "saved"]].mean()
            again = part.groupby("seed")[["recalibrated_worst_risk", "recalibrated_saved"]].mean()
            cells = [_values(means["full_accuracy"]), _values(means["excess_risk"], 4, "+")]
            cells += [_values(100 * means["saved"], 1), _values(again["recalibrated_worst_risk"])]
            cells += [_values(100 * again["recalibrated_saved"], 1), str(len(means))]
            rows.append([*labels, str(severity), *cells])
    heads = ["data set", "network", "method", "severity", "accuracy, last exit", "excess risk", "saved, %"]
    heads += ["recalibrated: highest risk", "recalibrated: saved, %", "seeds"]
    return markdown(heads, rows) if rows else "*Not measured yet.*"


# ---------------------------------------------------------------- early exits in a federation


def _cost_of(accuracy: float, curve: Sequence[tuple[float, float]]) -> float:
    """Lowest cost at which a (cost, accuracy) curve reaches an accuracy, or NaN."""
    points = sorted(curve)
    for index, (cost, reached) in enumerate(points):
        if reached >= accuracy:
            if index == 0:
                return cost
            cost_before, before = points[index - 1]
            return cost_before + (accuracy - before) / (reached - before) * (cost - cost_before)
    return math.nan


def _columns(frame: pd.DataFrame, kind: str) -> list[int]:
    names = frame.columns.str.extract(rf"^{kind}_(\d+)$")[0].dropna().astype(int)
    return sorted(number for number in names if frame[f"{kind}_{number}"].notna().all())


def _static(frame: pd.DataFrame) -> dict[str, pd.Series]:
    """Accuracy by seed of the methods without exits, and of their local baseline."""
    static = frame[frame["exit_2"].isna()]
    scores = {name: group.set_index("seed")["mean"] for name, group in static.groupby("method")}
    if len(static):
        scores["Local, without exits"] = static.drop_duplicates("seed").set_index("seed")["local_mean"]
    return scores


def _best_static(frame: pd.DataFrame) -> str:
    scores = _static(frame)
    seeds = max((set(series.index) for series in scores.values()), key=len)
    full = {name: series for name, series in scores.items() if seeds <= set(series.index)}
    return max(full, key=lambda name: full[name].mean())


def exit_methods(grid: str) -> str:
    """Methods with early exits: accuracy per exit and within FLOPs budgets."""
    frame = read(f"{grid}/cifar10.csv")
    best = _static(frame)[_best_static(frame)]
    multi = frame[frame["exit_2"].notna()]
    exits, budgets = _columns(multi, "exit"), _columns(multi, "budget")
    place = multi.iloc[0]
    rows = []
    for name, group in sorted(multi.groupby("method"), key=lambda item: -item[1]["mean"].mean()):
        group = group.set_index("seed", drop=False)
        common = group.index.intersection(best.index)
        own = [b for b in budgets if group[f"budget_{b}"].notna().all()]
        curve = [(group.loc[common, f"budget_{b}_flops"].mean(), group.loc[common, f"budget_{b}"].mean()) for b in own]
        saved = 1 - _cost_of(best.loc[common].mean(), curve)
        within = [f"{group[f'budget_{b}'].mean():.4f} ({group[f'budget_{b}_flops'].mean():.0%})" for b in BUDGETS]
        at_exits = [f"{group[f'exit_{e}'].mean():.4f}" for e in exits]
        saving = "not reached" if math.isnan(saved) else f"{saved:.1%}"
        rows.append([name, spread(group["mean"], False), *at_exits, *within, saving, str(len(group))])
    first = multi[multi["method"] == rows[0][0]]
    heads = [f"exit {e} ({first[f'exit_{e}_flops'].mean():.0%} of the FLOPs)" for e in exits]
    title = f"CIFAR-10, alpha {place['alpha']:g}, {place['clients']} clients, {place['rounds']} rounds"
    budget_heads = [f"budget {b}% (used)" for b in BUDGETS]
    return markdown([title, "accuracy", *heads, *budget_heads, "FLOPs saved", "seeds"], rows)


def best_static(grid: str) -> str:
    """The best method without exits, and its accuracy."""
    frame = read(f"{grid}/cifar10.csv")
    name = _best_static(frame)
    return f"{name.removesuffix(', static')} without exits, {_static(frame)[name].mean():.4f}"


# ---------------------------------------------------------------- do no harm


#: Tests, as printed.
TESTS = {"sign": "sign test", "unconditional": "unconditional test"}


def _accepted(clients: pd.DataFrame, rule: DoNoHarm) -> pd.Series:
    """True for each client whose comparison deploys the federated model."""
    counts = clients[["worse", "better", "samples"]].astype(int).itertuples(index=False)
    return pd.Series([rule.p_value(*row) <= rule.level for row in counts], index=clients.index)


def do_no_harm(grid: str) -> str:
    """Delta if all clients adopt the federated model, and if an exact test decides."""
    rows = []
    for method, group in read(f"{grid}/fashionmnist.csv").groupby("method"):
        runs = [json.loads(text) for text in group.sort_values("seed")["evidence"]]
        rule = DoNoHarm.from_stored(runs[0]["rule"])
        frames = [pd.DataFrame(run["clients"]).assign(run=index) for index, run in enumerate(runs)]
        clients = pd.concat(frames, ignore_index=True).dropna(subset=["samples"])
        gain = clients["score"] - clients["local"]
        adopted = {"all clients adopt it": gain.notna()}
        for margin, test in product(MARGINS, TESTS):
            decisions = _accepted(clients, replace(rule, margin=margin, test=test))
            adopted[f"{TESTS[test]}, margin {margin:g}"] = decisions
        for rule_name, takes in adopted.items():
            of_run = gain.where(takes, 0.0).groupby(clients["run"])
            deltas = [minus(spread(values, True)) for values in (of_run.mean(), of_run.min())]
            share = f"{takes.sum()} of {len(takes)}"
            rows.append([method, rule_name, share, *deltas, str(len(runs))])
    title = "FashionMNIST, alpha 0.1, confidence 0.9"
    return markdown([title, "rule", "clients that adopt it", "Delta avg", "Delta worst", "seeds"], rows)


def _cells(frame: pd.DataFrame, column: str, text: pd.Series) -> list[list[str]]:
    """Rows of texts per setting, one cell per value of `column`."""
    keys = [name for name in ("samples", "margin", "differing") if name in frame]
    table = frame.assign(text=text).pivot(index=keys, columns=column, values="text")
    return [[f"{key[0]:,.0f}", *(f"{value:g}" for value in key[1:]), *texts] for key, texts in table.T.items()]


def exact_level() -> str:
    """Largest probability of a wrong decision by number of samples, margin and level."""
    frame = read("exact_test/level.csv").sort_values("level", ascending=False).drop(columns="differing")
    levels = [f"level {level:g}" for level in sorted(frame["level"].unique())]
    return markdown(["n", "margin", *levels], _cells(frame, "level", frame["worst"].map("{:.5f}".format)))


def exact_power() -> str:
    """Power of the sign test and of the unconditional test, and their bound."""
    frame = read("exact_test/power.csv")
    parts = [frame[name].map("{:.2f}".format) for name in ("sign", "unconditional", "bound")]
    gains = [f"gain {gain:g}" for gain in sorted(frame["gain"].unique())]
    return markdown(["n", "margin", "q", *gains], _cells(frame, "gain", parts[0] + ", " + parts[1] + ", " + parts[2]))


def exact_loss() -> str:
    """Largest difference of the bound and the power where the bound is at least 0.3."""
    frame = read("exact_test/power.csv")
    return f"{(frame['bound'] - frame['unconditional'])[frame['bound'] >= 0.3].max():.3f}"


def _compared_clients(method: str) -> pd.DataFrame:
    """One row per client of the hospital grid that compared classifiers."""
    clients = []
    for path in sorted((RESULTS / "hospital").glob("*.csv")):
        frame = pd.read_csv(path)
        for run in frame[(frame["method"] == method) & (frame["metric"] == "accuracy")].itertuples():
            of_run = pd.DataFrame(json.loads(run.evidence)["clients"])
            clients.append(of_run.assign(run=f"{run.dataset} {run.alpha} {run.seed}"))
    return pd.concat(clients, ignore_index=True).dropna(subset=["samples"])


def hospital_decisions(method: str) -> str:
    """Clients of the hospital grid that take the model, by both tests."""
    clients, rows = _compared_clients(method), []
    gain = clients["score"] - clients["local"]
    is_large = gain > LARGE_GAIN
    adopted = {("", "all clients take it"): gain.notna()}
    for margin, test in product((0.0, 0.01), TESTS):
        adopted[f"{margin:g}", TESTS[test]] = _accepted(clients, DoNoHarm(margin=margin, test=test))
    for (margin, name), takes in adopted.items():
        of_run = gain.where(takes, 0.0).groupby(clients["run"])
        deltas = [minus(f"{value:+.4f}") for value in (of_run.mean().mean(), of_run.min().mean())]
        taken = [f"{takes.sum()} of {len(takes)}", f"{(takes & is_large).sum()} of {is_large.sum()}"]
        rows.append([margin, name, *taken, *deltas, minus(f"{gain.where(takes, 0.0).min():+.4f}")])
    heads = ["margin", "rule", "clients that take it", "of those with a gain over 5 points", "Delta avg", "Delta worst"]
    return markdown([*heads, "worst client of all"], rows)


def deployment() -> str:
    """Models that clients of ProxyEnsemble deploy by each rule, and Delta."""
    frame, rows = read("do_no_harm/deployment/summary.csv"), []
    for row in frame.itertuples():
        taken = [f"{row.taken} of {row.clients}", f"{row.large_taken} of {row.large}"]
        deltas = [minus(f"{value:+.4f}") for value in (row.delta_avg, row.delta_worst, row.delta_min)]
        rows.append([f"{row.margin:g}", row.rule, *taken, *deltas, str(row.harmed)])
    heads = ["margin", "rule", "clients that take a model", "of those with a gain over 5 points", "Delta avg"]
    return markdown([*heads, "Delta worst", "worst client of all", "clients that lose the margin or more"], rows)


# ---------------------------------------------------------------- exits calibrated by each client


@cache
def _coverage(grid: str) -> pd.DataFrame:
    """One row per method, seed, target risk, mode and client."""
    rows = []
    for run in read(f"{grid}/fashionmnist.csv").sort_values("seed").itertuples():
        for entry in json.loads(run.coverage):
            base = {"method": run.method, "seed": run.seed, "risk": entry["target_risk"], "mode": entry["mode"]}
            base |= {"draws": entry["draws"], "union": entry["union_violations"] / entry["draws"]}
            for client in entry["clients"]:
                counts = {"own": client["violations"], "pooled": client["pooled_violations"]}
                rows.append({**base, **client["report"], **counts})
    return pd.DataFrame(rows)


def _coverage_groups(grid: str) -> list[tuple[tuple[float, str, str], pd.DataFrame]]:
    frame = _coverage(grid)
    order = list(dict.fromkeys(frame["mode"]))
    return sorted(
        frame.groupby(["risk", "mode", "method"]), key=lambda item: (item[0][0], order.index(item[0][1]), item[0][2])
    )


def savings(grid: str) -> str:
    """What calibrated exits save on the clients' test splits."""
    rows = []
    for (risk, mode, method), group in _coverage_groups(grid):
        change = group["accuracy"].mean() - group["full_accuracy"].mean()
        rows.append(
            [
                method,
                f"{risk:g}",
                f"`{mode}`",
                f"{group['open_exits'].mean():.2f} of {group['exits'].mean() - 1:g}",
                f"{group['early_share'].mean():.1%}",
                minus(f"{group['saved'].mean():.1%}"),
                minus(f"{group['accuracy'].mean():.4f} ({change:+.4f})"),
                str(group["seed"].nunique()),
            ]
        )
    heads = ["target risk", "mode", "exits open", "exit early", "FLOPs saved", "accuracy (change)", "seeds"]
    return markdown(["FashionMNIST, alpha 0.1", *heads], rows)


def coverage(grid: str) -> str:
    """How often the target risk is violated, per client and pooled."""
    rows = []
    for (risk, mode, method), group in _coverage_groups(grid):
        broken, draws = int(group["own"].sum()), int(group["draws"].sum())
        low, high = binomtest(broken, draws).proportion_ci(method="exact")
        rows.append(
            [
                method,
                f"{risk:g}",
                f"`{mode}`",
                f"{broken / draws:.3f} ({low:.3f} to {high:.3f})",
                f"{fmean(fmean(run['pooled']) / run['draws'].iloc[0] for _, run in group.groupby('seed')):.3f}",
                f"{(group['pooled'] / group['draws']).max():.3f}",
                f"{group.groupby('seed')['union'].first().mean():.3f}",
                f"{draws:,}",
            ]
        )
    heads = ["target risk", "mode", "own policy", "pooled policy", "pooled, worst client", "pooled, marginal", "draws"]
    return markdown(["FashionMNIST, alpha 0.1", *heads], rows)


def factors(grid: str) -> str:
    """Paired differences of the two factors, gate and schedule, with mode `ltt`."""
    means = _coverage(grid).query("mode == 'ltt'").groupby(["risk", "method", "seed"])
    means = means[["full_accuracy", "open_exits", "saved"]].mean()
    rows = []
    for risk, at_risk in means.groupby("risk"):
        pairs: dict[tuple[str, str], list[pd.Series]] = {}
        for one, other in combinations(sorted(at_risk.index.unique("method")), 2):
            changed = [p for p in zip(one.split(", "), other.split(", "), strict=True) if p[0] != p[1]]
            if len(changed) == 1:
                pairs.setdefault(changed[0], []).append(at_risk.loc[risk, one] - at_risk.loc[risk, other])
        for (first, second), differences in pairs.items():
            difference = pd.concat(differences)
            mean = difference.mean()
            rows.append(
                [
                    f"{risk:g}",
                    f"{first} − {second}",
                    minus(f"{mean['full_accuracy']:+.4f}"),
                    minus(f"{mean['open_exits']:+.2f}"),
                    minus(f"{100 * mean['saved']:+.1f} points"),
                    f"{int((difference['saved'] > 0).sum())} of {len(difference)}",
                ]
            )
    heads = ["target risk", "difference", "accuracy of the last exit", "exits open", "FLOPs saved", "saves more in"]
    return markdown(heads, rows)


# ---------------------------------------------------------------- guarantees per group


GROUPINGS = {
    "true_class": "true class",
    "predicted_class": "predicted class",
    "scanner": "scanner",
    "patient": "patient",
}
CALIBRATIONS = {
    "none": "no groups",
    "groups": "threshold per group",
    "shared": "shared thresholds",
    "images": "all images of a patient",
    "one image": "one image per patient",
}


def group_coverage() -> str:
    """Draws in which the error rate of some group exceeds the target risk."""
    frame = read("guarantees/groups.csv")
    keys = ["groups", "calibration", "target_risk"]
    rows = []
    for (by, calibration, risk), group in sorted(
        frame.groupby(keys), key=lambda item: (list(GROUPINGS).index(item[0][0]), *_place(item[0]))
    ):
        row = group[group["group"] == "any"].iloc[0]
        worst = group[group["group"] != "any"].sort_values("rate", kind="stable").iloc[-1]
        rows.append(
            [
                GROUPINGS[by],
                CALIBRATIONS[calibration],
                f"{risk:g}",
                "yes" if row["guarantee"] else "no",
                f"{row['rate']:.3f} ({row['low']:.3f} to {row['high']:.3f})",
                f"{worst['group']}, {worst['rate']:.3f}" if worst["violations"] and by != "patient" else "",
                f"{row['open']:.2f}",
                f"{row['saved']:.1%}",
            ]
        )
    heads = ["groups", "calibration", "target risk", "guarantee", "violated in some group", "worst group"]
    return markdown([*heads, "draws with an open exit", "FLOPs saved"], rows)


def _place(key: tuple[str, str, float]) -> tuple[int, float]:
    return list(CALIBRATIONS).index(key[1]), key[2]


def single_groups(by: str, risk: float) -> str:
    """Draws in which each single group exceeds the target risk, per calibration."""
    frame = read("guarantees/groups.csv")
    frame = frame[(frame["groups"] == by) & (frame["target_risk"] == risk) & (frame["group"] != "any")]
    calibrations = [name for name in CALIBRATIONS if name in set(frame["calibration"])]
    rows = []
    for name, group in frame.groupby("group", sort=False):
        cells = group.set_index("calibration").loc[calibrations]
        rows.append(
            [
                str(name),
                *(f"{row['rate']:.3f} ({row['low']:.3f} to {row['high']:.3f})" for _, row in cells.iterrows()),
            ]
        )
    return markdown([GROUPINGS[by], *(CALIBRATIONS[name] for name in calibrations)], rows)


def patient_power() -> str:
    """Power of three tests of the error rate of patients."""
    names = ["one_image", "mean_bets", "mean_bentkus"]
    rows = [
        [
            str(int(row["patients"])),
            str(int(row["images"])),
            f"{row['correlation']:g}",
            *(f"{row[n]:.2f}" for n in names),
        ]
        for _, row in read("guarantees/patients.csv").iterrows()
    ]
    heads = ["patients", "images of each", "correlation of errors", "one image, binomial", "mean, bets"]
    return markdown([*heads, "mean, Bentkus"], rows)


# ---------------------------------------------------------------- monitor


#: Scenarios of `experiments.monitoring`, as printed.
SCENARIOS = {
    "none": "no change",
    "at target": "error rate at the target",
    "gaussian_noise-3": "Gaussian noise, severity 3",
    "contrast-3": "contrast, severity 3",
    "gaussian_noise-5": "Gaussian noise, severity 5",
}


def _streams() -> pd.DataFrame:
    frame = read("monitoring/streams.csv")
    places = frame["scenario"].map(list(SCENARIOS).index)
    return frame.assign(place=places).sort_values("place", kind="stable")


def monitoring_pools() -> str:
    """True values of the followed quantities in each pool of samples."""
    rows = []
    for row in read("monitoring/pools.csv").itertuples():
        limit = "" if math.isnan(row.limit) else f"at most {row.limit:g}"
        rows.append([SCENARIOS[row.pool], row.quantity, minus(f"{row.mean:.4f}"), limit, f"{row.samples:,}"])
    return markdown(["samples", "quantity", "mean", "hypothesis", "number"], rows)


def monitoring_false_alarms() -> str:
    """Streams with a false alarm of any quantity, with exact intervals."""
    rows = []
    for row in _streams().query("quantity == 'any' and scenario in ('none', 'at target')").itertuples():
        low, high = binomtest(row.false_alarms, row.streams).proportion_ci(method="exact")
        share = f"{row.false_alarms / row.streams:.3f} ({low:.3f} to {high:.3f})"
        rows.append([SCENARIOS[row.scenario], row.family, row.test, share, f"{row.streams:,}"])
    return markdown(["scenario", "arrivals", "test", "streams with a false alarm", "streams"], rows)


def monitoring_delays() -> str:
    """Delay of the first alarm after the change, in arrivals."""
    rows = []
    changed = _streams().query("scenario not in ('none', 'at target') and quantity not in ('any', 'do_no_harm')")
    for (_, scenario, change, family, quantity), group in changed.groupby(
        ["place", "scenario", "change", "family", "quantity"], sort=False
    ):
        cells = []
        for row in group.itertuples():
            delays = [
                f"{value:.0f}" if math.isfinite(value) else "none"
                for value in (row.delay, row.delay_low, row.delay_high)
            ]
            cells.append(
                f"{delays[0]} ({delays[1]} to {delays[2]}), {row.alarms_after / (row.streams - row.false_alarms):.0%}"
            )
        rows.append([SCENARIOS[scenario], f"{change:,}", family, quantity, *cells])
    heads = ["change", "after", "arrivals", "quantity", *changed["test"].unique()]
    return markdown(heads, rows)


# ---------------------------------------------------------------- pages


FUNCTIONS = (
    methods, sweep, gate, verdicts, exits, policies, validity, exit_savings, exit_calibration, exit_corruptions,
    exit_methods, best_static, do_no_harm, exact_level, exact_power, exact_loss, hospital_decisions, deployment,
    savings, coverage, factors, hospital, hospital_summary, proxies, natural_sites, group_coverage, single_groups,
    patient_power, monitoring_pools, monitoring_false_alarms, monitoring_delays,
)  # fmt: skip


def render() -> dict[Path, str]:
    """The pages by path."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        autoescape=False,  # Markdown, not HTML
    )
    environment.globals |= {function.__name__: function for function in FUNCTIONS}
    return {
        DOCS / "results" / name.removesuffix(".jinja"): environment.get_template(name).render()
        for name in environment.list_templates()
    }


def main(argv: Sequence[str]) -> int:
    """Write the pages; with `--check` only compare them."""
    stale = [path for path, text in render().items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    for path in stale:
        print(f"{path.relative_to(DOCS.parent)}: {'differs' if '--check' in argv else 'written'}")
        if "--check" not in argv:
            path.parent.mkdir(exist_ok=True)
            path.write_text(render()[path], encoding="utf-8")
    return 1 if stale and "--check" in argv else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

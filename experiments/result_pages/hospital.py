"""Tables of the methods at hospital scale and on natural sites."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean

import pandas as pd
from scipy.stats import ttest_rel

from experiments.fedekd_paper.statistics import MIN_SEEDS, holm
from experiments.result_pages.common import FIGURES, NOT_MEASURED, RESULTS, markdown, spread
from fedekd.metrics import METRICS, MetricSpec

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
        return NOT_MEASURED
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
    for name, p in zip(tested, holm([p_values[name] or 0.0 for name in tested]), strict=True):
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
        return NOT_MEASURED
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
        return NOT_MEASURED
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

"""Tables of early exits, of one site and in a federation."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import pandas as pd

from experiments.fedekd_paper.load import display_name
from experiments.result_pages.common import NOT_MEASURED, RESULTS, markdown, minus, read, spread

BUDGETS = (25, 50, 75)


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
        name = display_name(dataset) + (f", {samples:,} images" if samples else "")
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
    return markdown(heads, rows) if rows else NOT_MEASURED


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
    return markdown(heads, rows) if rows else NOT_MEASURED


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
    return markdown(heads, rows) if rows else NOT_MEASURED


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

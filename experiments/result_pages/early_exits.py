"""Tables of early exits, of one site and in a federation."""

from __future__ import annotations

import math
from collections.abc import Iterable

import pandas as pd

from experiments.fedekd_paper.exits import ExitComparison, exit_comparisons, exit_table, with_interval
from experiments.fedekd_paper.load import arrange, display_name
from experiments.result_pages.common import NOT_MEASURED, RESULTS, markdown, minus, read
from fedekd.benchmark import numeric, read_results


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


#: Columns in which changes of a method are compared, and their titles.
COMPARED = {"mean": "last exit", "exit_1": "first exit", "budget_50": "budget 50%"}

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
    heads += ["ECE of exiting images", "ECE of exiting images, scaled", "seeds"]
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


def exit_methods(grid: str) -> str:
    """Methods with early exits: accuracy per exit and within FLOPs budgets."""
    comparison = _comparison(grid)
    table = exit_table(comparison).rename(columns={"method": comparison.name})
    return markdown(list(table), [[row[0], *(minus(str(cell)) for cell in row[1:])] for row in table.to_numpy()])


def learning_rates(grid: str) -> str:
    """Mean accuracy of methods named `METHOD, lr RATE`, the best in bold."""
    runs = numeric(read_results(RESULTS / grid))
    runs[["name", "rate"]] = runs["method"].str.extract(r"^(.*), lr ([\d.]+)$").to_numpy()
    table = runs.pivot_table(index="name", columns="rate", values="mean", sort=False)
    table = table[sorted(table, key=float)].loc[table.max(axis=1).sort_values(ascending=False).index]
    rows = [
        [name, *("" if math.isnan(x) else f"**{x:.4f}**" if x == row.max() else f"{x:.4f}" for x in row)]
        for name, row in table.iterrows()
    ]
    return markdown(["accuracy at learning rate", *table], rows)


def exit_parts(grid: str, parts: str) -> str:
    """Differences that a change of a method makes, paired by seed.

    Methods of `parts` are named `BASE, CHANGE`, where BASE is a method of `grid`, or only `BASE`.
    """
    changed = numeric(read_results(RESULTS / parts)).set_index(["method", "seed"])
    bases = numeric(read_results(RESULTS / grid)).set_index(["method", "seed"])
    rows = []
    for name in changed.index.unique("method"):
        base, _, change = name.partition(", ")
        runs = changed.loc[name]
        differences = [(runs[column] - bases.loc[base, column]).dropna().tolist() for column in COMPARED]
        cells = [minus(with_interval(values if change else [])) for values in differences]
        rows.append([base, change, f"{runs['mean'].mean():.4f}", *cells, str(len(differences[0]))])
    heads = ["method", "change", "accuracy", *(f"difference, {title}" for title in COMPARED.values()), "seeds"]
    return markdown(heads, rows) if rows else NOT_MEASURED


def best_static(grid: str) -> str:
    """The best method without exits, and its accuracy."""
    plain = _comparison(grid).plain
    assert plain is not None
    return f"{plain[0].removesuffix(', static')} without exits, {plain[1]:.4f}"


def _comparison(grid: str) -> ExitComparison:
    [comparison] = exit_comparisons(arrange(numeric(read_results(RESULTS / grid))))
    return comparison

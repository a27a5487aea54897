"""Tables of trust, label shift and membership inference, at hospital scale."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from experiments.fedekd_paper.load import display_name
from experiments.result_pages.common import NOT_MEASURED, RESULTS, markdown, minus, spread
from experiments.trust.__main__ import comparisons

#: Combination of the members with which the others are compared.
EQUAL = "equal weights"


def _read(path: str) -> pd.DataFrame:
    """Return the rows of an experiment; none before it has run."""
    file = RESULTS / path
    return pd.read_csv(file, dtype={"commit": str}) if file.is_file() else pd.DataFrame()


def _setting(dataset: str, alpha: float) -> str:
    return f"{display_name(dataset)}, alpha {alpha:g}"


def _paired(means: pd.DataFrame, base: pd.Series, names: Sequence[str]) -> list[str]:
    """Return the differences to a base over seeds, one text per column."""
    return [minus(spread(means[name] - base, signed=True)) if name in means else "" for name in names]


def trust_distillation() -> str:
    """Difference of Delta between each gate and its control, over seeds."""
    rows = _read("trust/distillation.csv")
    if rows.empty:
        return NOT_MEASURED
    table = comparisons(rows)
    heads = ["setting", "comparison", "average Delta", "standard error", "better", "p", "worst Delta", "seeds"]
    return markdown(
        heads,
        [
            [
                row.setting,
                row.comparison.replace(" - ", " − "),
                minus(f"{row.delta:+.4f}"),
                f"{row.standard_error:.4f}",
                str(row.better),
                "" if pd.isna(row.p_value) else f"{row.p_value:.2g}",
                minus(f"{row.worst:+.4f}"),
                str(row.seeds),
            ]
            for row in table.itertuples()
        ],
    )


def trust_serving() -> str:
    """Accuracy of each combination of the members minus that of equal weights."""
    frame = _read("trust/serving.csv")
    if frame.empty:
        return NOT_MEASURED
    columns: dict[str, dict[str, str]] = {}
    for (dataset, alpha), group in frame.groupby(["dataset", "alpha"]):
        means = group.groupby(["seed", "combination"], sort=False)["accuracy"].mean().unstack()
        base = means.pop(EQUAL)
        cells = dict(zip(means, _paired(means, base, list(means)), strict=True))
        columns[f"{_setting(dataset, alpha)} ({len(base)} seeds)"] = {EQUAL: spread(base, signed=False), **cells}
    names = list(dict.fromkeys(name for cells in columns.values() for name in cells))
    rows = [[name, *(cells.get(name, "") for cells in columns.values())] for name in names]
    return markdown(["combination", *columns], rows)


def label_shift(inputs: int) -> str:
    """Accuracy without correction, and the gain of each served prior.

    Args:
        inputs: Number of test inputs.
    """
    frame = _read("label_shift/label_shift.csv")
    if frame.empty:
        return NOT_MEASURED
    frame = frame[frame["inputs"] == inputs]
    served = [name for name in frame["served"].unique() if name != "train"]
    rows = []
    for (dataset, alpha, method, mix), group in frame.groupby(["dataset", "alpha", "method", "mix"], sort=False):
        means = group.groupby(["seed", "served"], sort=False)["accuracy"].mean().unstack()
        base = means.pop("train")
        shift = group["shift"].mean()
        cells = [spread(base, signed=False), *_paired(means, base, served)]
        rows.append([_setting(dataset, alpha), method, mix, f"{shift:.2f}", *cells, str(len(base))])
    return markdown(["setting", "method", "test inputs", "shift", "no correction", *served, "seeds"], rows)


def membership(attacks: Sequence[str]) -> str:
    """Success of attacks on what methods send, means over seeds.

    Args:
        attacks: Names of attacks.
    """
    frame = _read("privacy/membership.csv")
    if frame.empty or not len(frame := frame[frame["attack"].isin(attacks) & (frame["client"] == -1)]):
        return NOT_MEASURED
    frame = frame.assign(noise=frame["noise_multiplier"].fillna(0.0))
    keys = ["method", "attack", "noise", "target", "adjustment"]
    rows = []
    for (method, attack, noise, target, adjustment), group in frame.groupby(keys):
        prior = "with" if adjustment == "prior" else "without"
        labels = [method, attack.replace("_", " "), f"{noise:g}", target, prior]
        cells = [minus(spread(group[name], signed=False)) for name in ("auc", "advantage", "tpr_at_fpr_0.01")]
        costs = [""] * 2
        if "delta" in group and group["delta"].notna().any():
            epsilon = group["epsilon"].mean()
            costs = [minus(spread(group["delta"], signed=True)), "" if pd.isna(epsilon) else f"{epsilon:,.0f}"]
        rows.append([*labels, *cells, *costs, str(len(group))])
    heads = ["method", "attack", "noise", "network", "prior", "AUC", "advantage", "TPR at 1% FPR"]
    return markdown([*heads, "Delta", "epsilon", "seeds"], rows)

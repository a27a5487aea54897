"""Tables of exits that each client calibrates, with a guarantee per client."""

from __future__ import annotations

import json
from functools import cache
from itertools import combinations
from statistics import fmean

import pandas as pd
from scipy.stats import binomtest

from experiments.result_pages.common import markdown, minus, read


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

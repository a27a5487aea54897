"""Calibrated exits of finished runs: savings and violations of the target."""

from __future__ import annotations

import json
from itertools import combinations

import pandas as pd
from scipy.stats import binomtest

from experiments.fedekd_paper.load import display_name
from fedekd.benchmark.results import COVERAGE
from fedekd.early_exit.calibration.calibrator import MODES
from fedekd.reporting.pages import minus

#: A row is a run, calibration mode, target risk and client.
_RUN = ["dataset", "alpha", "method", "seed"]
_GROUP = ["target_risk", "mode", "method"]


def coverage_rows(results: pd.DataFrame) -> pd.DataFrame:
    """Return one row per run, target risk, calibration mode and client.

    Returns:
        Columns of the run, target_risk, confidence, mode, draws, the fields of the client's exit report, and the number
        of draws that violate the target risk: own (the client's policy), pooled (a policy calibrated on the samples of
        all clients, on this client's samples) and marginal (the same policy, on the samples of all clients).
    """
    rows = []
    for run in results.to_dict("records") if COVERAGE in results else ():
        for entry in json.loads(run[COVERAGE] or "[]"):
            shared = {name: value for name, value in entry.items() if name not in ("clients", "union_violations")}
            for client in entry["clients"]:
                counts = {
                    "own": client["violations"],
                    "pooled": client["pooled_violations"],
                    "marginal": entry["union_violations"],
                }
                rows.append({name: run[name] for name in _RUN} | shared | client["report"] | counts)
    frame = pd.DataFrame(rows)
    if frame.empty:
        return frame
    modes = list(MODES)
    return frame.sort_values(
        ["dataset", "alpha", *_GROUP, "seed", "client"], key=lambda c: c.map(modes.index) if c.name == "mode" else c
    )


def settings(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Return the rows of each data set and alpha by printed name."""
    groups = rows.groupby(["dataset", "alpha"]) if len(rows) else ()
    return {f"{display_name(dataset)}, alpha {alpha:g}": group for (dataset, alpha), group in groups}


def saving_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the savings on the clients' test splits as printed cells."""
    lines = []
    for (risk, mode, method), group in rows.groupby(_GROUP, sort=False):
        # Means over clients of a run, then over runs.
        mean = (
            group.groupby("seed")[["open_exits", "exits", "early_share", "saved", "accuracy", "full_accuracy"]]
            .mean()
            .mean()
        )
        lines.append(
            {
                **{"method": method, "target risk": f"{risk:g}", "mode": mode},
                "open exits": f"{mean['open_exits']:.2f} of {mean['exits'] - 1:g}",
                "early exits": f"{mean['early_share']:.1%}",
                "FLOPs saved": f"{mean['saved']:.1%}",
                "accuracy (change)": f"{mean['accuracy']:.4f} ({mean['accuracy'] - mean['full_accuracy']:+.4f})",
                "seeds": group["seed"].nunique(),
            }
        )
    return pd.DataFrame(lines)


def violation_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the shares of draws that violate the target risk, as printed cells."""
    lines = []
    for (risk, mode, method), group in rows.groupby(_GROUP, sort=False):
        violations, draws = int(group["own"].sum()), int(group["draws"].sum())
        interval = binomtest(violations, draws).proportion_ci(method="exact")
        shares = group.assign(pooled=group["pooled"] / group["draws"], marginal=group["marginal"] / group["draws"])
        mean = shares.groupby("seed")[["pooled", "marginal"]].mean().mean()
        lines.append(
            {
                **{"method": method, "target risk": f"{risk:g}", "mode": mode},
                "own policy": f"{violations / draws:.3f} ({interval.low:.3f} to {interval.high:.3f})",
                "pooled policy": f"{mean['pooled']:.3f}",
                "pooled, worst client": f"{shares['pooled'].max():.3f}",
                "pooled, all samples": f"{mean['marginal']:.3f}",
                "draws": f"{draws:,}",
            }
        )
    return pd.DataFrame(lines)


def findings(rows: pd.DataFrame) -> list[str]:
    """Return the effects of each factor and of the calibration mode as sentences.

    A label is a list of factors: two methods whose labels differ in one part are a pair, compared seed by seed.
    """
    return [*_factor_sentences(rows), *_mode_sentences(rows)]


def _factor_sentences(rows: pd.DataFrame) -> list[str]:
    quantities = ["full_accuracy", "open_exits", "saved"]
    with_guarantee = rows[rows["mode"].map(lambda mode: MODES[mode].has_guarantee)]
    sentences = []
    for (risk, mode), group in with_guarantee.groupby(["target_risk", "mode"], sort=False):
        means = group.groupby(["method", "seed"])[quantities].mean()
        parts = []
        for (first, second), pairs in _pairs(sorted(group["method"].unique())).items():
            gain = pd.concat([means.loc[one] - means.loc[other] for one, other in pairs]).dropna()
            if len(gain):
                mean = gain.mean()
                runs = f"{len(gain)} pair{'s' if len(gain) > 1 else ''} of runs"
                parts.append(
                    f"{first} against {second} ({runs}), accuracy of the last exit {mean['full_accuracy']:+.4f}, open"
                    f" exits {mean['open_exits']:+.2f}, FLOPs saved {100 * mean['saved']:+.1f} points (more in"
                    f" {(gain['saved'] > 0).sum()} of {len(gain)})"
                )
        if parts:
            sentences.append(minus(f"At target risk {risk:g} with {mode}: {'; '.join(parts)}."))
    return sentences


def _pairs(methods: list[str]) -> dict[tuple[str, str], list[tuple[str, str]]]:
    """Return pairs of labels that differ in one part, by that part.

    In a pair, `X` comes before `no X`.
    """
    found: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for one, other in combinations(methods, 2):
        parts = one.split(", "), other.split(", ")
        changed = [pair for pair in zip(*parts, strict=False) if pair[0] != pair[1]]
        if len(parts[0]) == len(parts[1]) and len(changed) == 1:
            first, second = changed[0]
            if (second, first) in found or first == f"no {second}":
                first, second, one, other = second, first, other, one
            found.setdefault((first, second), []).append((one, other))
    return found


def _mode_sentences(rows: pd.DataFrame) -> list[str]:
    sentences = []
    for risk, group in rows.groupby("target_risk", sort=False):
        parts = []
        for mode, runs in group.groupby("mode", sort=False):
            saved = runs.groupby(["method", "seed"])["saved"].mean().groupby("method").mean().mean()
            violated = runs["own"].sum() / runs["draws"].sum()
            parts.append(
                minus(f"{mode} saves {saved:.1%}") + f" of the FLOPs and violates {violated:.1%} of its targets"
            )
        if len(parts) > 1:
            sentences.append(f"At target risk {risk:g}, over all methods, {', '.join(parts)}.")
    return sentences

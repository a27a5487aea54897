"""Decisions of do-no-harm rules, from stored counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import pandas as pd

from fedekd.do_no_harm.rule import DoNoHarm

#: A gain in accuracy that a rule should find.
LARGE_GAIN = 0.05

MARGINS = (0.0, 0.01)


class DeploymentRule(NamedTuple):
    """Rule of one line of the table.

    Attributes:
        title: Its name.
        test: `do_no_harm.test`.
        splits: Splits on whose samples the models are compared.
        candidates: Candidates in the order of the tests.
    """

    title: str
    test: str
    splits: tuple[str, ...]
    candidates: tuple[str, ...]


#: Weights that are fitted on the tuning split leave the holdout split for the comparison; equal ones leave both.
RULES = (
    DeploymentRule("earlier: sign test", "sign", ("holdout",), ("ensemble",)),
    DeploymentRule("unconditional test", "unconditional", ("holdout",), ("ensemble",)),
    DeploymentRule("tuned, ensemble", "unconditional", ("holdout",), ("tuned", "ensemble")),
    DeploymentRule("ensemble, tuned", "unconditional", ("holdout",), ("ensemble", "tuned")),
    DeploymentRule("equal weights", "unconditional", ("tuning", "holdout"), ("equal",)),
    DeploymentRule("equal weights, tuned", "unconditional", ("tuning", "holdout"), ("equal", "tuned")),
    DeploymentRule("tuned, equal weights", "unconditional", ("tuning", "holdout"), ("tuned", "equal")),
)

_CLIENT = ["dataset", "alpha", "seed", "client"]


def decide(rule: DeploymentRule, margin: float, rows: Mapping[str, Mapping[str, float]]) -> str:
    """Return the candidate that a client deploys, or `local`.

    Args:
        rule: The rule.
        margin: `do_no_harm.margin`.
        rows: Row of the results by candidate.
    """
    test = DoNoHarm(test=rule.test, margin=margin)  # type: ignore[arg-type]
    passed: dict[str, float] = {}
    for name in rule.candidates:
        row, counts = rows[name], ("worse", "better", "samples")
        worse, better, samples = (sum(int(row[f"{split}_{count}"]) for split in rule.splits) for count in counts)
        if not samples or test.p_value(worse, better, samples) > test.level:
            break
        passed[name] = (better - worse) / samples
    return max(passed, key=passed.__getitem__, default="local")


def deployed(results: pd.DataFrame, rules: Sequence[DeploymentRule] = RULES) -> pd.DataFrame:
    """Return one row per client, rule and margin.

    Columns: `model`, the deployed one; `delta`, its test accuracy minus that of the local model; `best_gain`, the
    largest such difference of the rule's candidates.
    """
    rows = []
    for key, group in results.groupby(_CLIENT, sort=False):
        of_candidate = group.set_index("candidate").to_dict("index")
        gains = {name: row["accuracy"] - row["local"] for name, row in of_candidate.items()}
        for margin in MARGINS:
            for rule in rules:
                model = decide(rule, margin, of_candidate)
                best = max(gains[name] for name in rule.candidates)
                row = dict(zip(_CLIENT, key, strict=True)) | {"margin": margin, "rule": rule.title, "model": model}
                rows.append(row | {"delta": gains.get(model, 0.0), "best_gain": best})
    return pd.DataFrame(rows)


def summary(decisions: pd.DataFrame) -> pd.DataFrame:
    """Return one row per margin and rule: clients that take a model, and Delta.

    Delta of a run is the mean, or the worst, over its clients; the figures are means over runs. Among the clients whose
    best candidate gains more than 5 points on the test split are counted those that take one.
    """
    rows = []
    for (margin, title), group in decisions.groupby(["margin", "rule"], sort=False):
        takes, is_large = group["model"] != "local", group["best_gain"] > LARGE_GAIN
        delta = group.groupby(["dataset", "alpha", "seed"])["delta"]
        rows.append(
            {
                "margin": margin,
                "rule": title,
                "taken": int(takes.sum()),
                "clients": len(group),
                "large_taken": int((takes & is_large).sum()),
                "large": int(is_large.sum()),
                "harmed": int((group["delta"] <= -max(margin, 1e-12)).sum()),
                "delta_avg": delta.mean().mean(),
                "delta_worst": delta.min().mean(),
                "delta_min": group["delta"].min(),
                "runs": delta.ngroups,
            }
        )
    return pd.DataFrame(rows)

"""Effect of `do_no_harm` for several margins, from finished runs."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

import pandas as pd

from experiments.fedekd_paper.load import display_name
from fedekd.benchmark.results import EVIDENCE
from fedekd.do_no_harm.rule import DoNoHarm
from fedekd.metrics import primary_metric
from fedekd.reporting.document import spread

#: Printed margins, in accuracy.
MARGINS = (0.0, 0.005, 0.01, 0.02)


@dataclass(frozen=True)
class HarmTable:
    """The methods in one setting.

    Attributes:
        name: Data set and alpha, as printed.
        rule: The test, with one comparison at the end.
        samples: Mean size of a holdout split.
        differing: Mean share of its samples on which exactly one of the two models is right.
        lines: One row per method, decision and run: seed, share of clients that deploy the federated model (`taken`),
            delta_avg and delta_worst.
    """

    name: str
    rule: DoNoHarm
    samples: float
    differing: float
    lines: pd.DataFrame


def harm_tables(results: pd.DataFrame) -> list[HarmTable]:
    """Return a table per data set and alpha whose clients compared classifiers."""
    if EVIDENCE not in results:
        return []
    runs = results[(results["metric"] == primary_metric("classification").name) & results[EVIDENCE].ne("")]
    return [
        _table(f"{display_name(dataset)}, alpha {alpha:g}", group)
        for (dataset, alpha), group in runs.groupby(["dataset", "alpha"])
    ]


def _table(name: str, runs: pd.DataFrame) -> HarmTable:
    clients = []
    for run in runs.sort_values(["method", "seed"]).itertuples():
        evidence = json.loads(getattr(run, EVIDENCE))
        rule = replace(DoNoHarm.from_stored(evidence["rule"]), looks=1, rule="certified")
        clients.append(pd.DataFrame(evidence["clients"]).assign(method=run.method, seed=run.seed))
    # A client that took part in no round has compared nothing.
    frame = pd.concat(clients).dropna(subset=["samples"])
    gain = frame["score"] - frame["local"]
    decisions = {"all clients": pd.Series(True, index=frame.index)}
    for margin in MARGINS:
        test = replace(rule, margin=margin)
        p = [test.p_value(int(c.worse), int(c.better), int(c.samples)) for c in frame.itertuples()]
        decisions[f"margin {margin:g}"] = pd.Series(p, index=frame.index) <= rule.level
    lines = []
    for decision, taken in decisions.items():
        deployed = frame.assign(delta=gain.where(taken, 0.0), taken=taken).groupby(["method", "seed"])
        totals = deployed.agg(taken=("taken", "mean"), delta_avg=("delta", "mean"), delta_worst=("delta", "min"))
        lines.append(totals.reset_index().assign(rule=decision, clients=deployed.size().to_numpy()))
    rows = pd.concat(lines, ignore_index=True)
    order = list(decisions)
    rows = rows.sort_values(["method", "rule", "seed"], key=lambda c: c.map(order.index) if c.name == "rule" else c)
    differing = ((frame["worse"] + frame["better"]) / frame["samples"]).mean()
    return HarmTable(name, rule, frame["samples"].mean(), differing, rows)


def harm_table(table: HarmTable) -> pd.DataFrame:
    """Return the printed cells of a table."""
    rows = [
        {
            "method": method,
            "clients that deploy the federated model": rule,
            "share": f"{(group['taken'] * group['clients']).sum() / group['clients'].sum():.0%}",
            "Delta avg": spread(group["delta_avg"].tolist(), signed=True),
            "Delta worst": spread(group["delta_worst"].tolist(), signed=True),
            "seeds": len(group),
        }
        for (method, rule), group in table.lines.groupby(["method", "rule"], sort=False)
    ]
    return pd.DataFrame(rows)

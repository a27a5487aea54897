"""Tables of exits that each client calibrates, with a guarantee per client."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import combinations

import pandas as pd

from experiments.fedekd_paper.coverage import coverage_rows, saving_table, settings, violation_table
from experiments.result_pages.common import NOT_MEASURED, RESULTS, markdown, minus
from fedekd.benchmark import numeric, read_results


def savings(grid: str) -> str:
    """What calibrated exits save on the clients' test splits."""
    return _table(grid, saving_table)


def coverage(grid: str) -> str:
    """How often the target risk is violated, per client and pooled."""
    return _table(grid, violation_table)


@cache
def _rows(grid: str) -> pd.DataFrame:
    return coverage_rows(numeric(read_results(RESULTS / grid)))


def _table(grid: str, table_of: Callable[[pd.DataFrame], pd.DataFrame]) -> str:
    tables = {name: table_of(rows) for name, rows in settings(_rows(grid)).items()}
    if not tables:
        return NOT_MEASURED
    [(name, table)] = tables.items()
    table["mode"] = "`" + table["mode"] + "`"
    heads = table.columns.to_series().replace("method", name)
    return markdown(list(heads), [[minus(str(cell)) for cell in row] for row in table.to_numpy()])


def factors(grid: str) -> str:
    """Paired differences of the two factors, gate and schedule, with mode `ltt`."""
    means = _rows(grid).query("mode == 'ltt'").groupby(["target_risk", "method", "seed"])
    means = means[["full_accuracy", "open_exits", "saved"]].mean()
    rows = []
    for risk, at_risk in means.groupby("target_risk"):
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

"""Results for the tests of the report on the paper."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest

from experiments.fedekd_paper.load import arrange
from fedekd.benchmark.results import COLUMNS, Row, numeric


def make_row(method: str, seed: int, delta: float, **changes: Any) -> Row:
    """Return the row of a run with an average Delta, a worst Delta of twice and a tail of 1.5 times that value."""
    values = {
        **dict.fromkeys(COLUMNS, "0"),
        **{"dataset": "fashionmnist", "alpha": 0.1, "method": method, "seed": seed, "metric": "accuracy"},
        **{"mean": 0.93 + delta, "local_mean": 0.93, "delta_avg": delta, "delta_worst": 2 * delta},
        **{"delta_tail": 1.5 * delta, "commit": "abc", "device": "cpu", **changes},
    }
    values.setdefault("key", "")
    if "key" not in changes:
        values["key"] = f"{values['dataset']}-{values['alpha']}-{method}-{seed}"
    return {name: str(value) for name, value in values.items()}


def retina_rows(method: str, seeds: int, delta: float) -> list[Row]:
    return [make_row(method, s, delta + 1e-3 * s, dataset="retinamnist", metric="rmse") for s in range(1, seeds + 1)]


def example_rows() -> list[Row]:
    """Ten seeds of a gate that helps a little, of permuted weights and of no gate; FedAvg; two other data sets."""
    rows = []
    for seed in range(10):
        rows.append(make_row("FedeKD", seed, -0.0065 + 0.006 * (seed % 3 - 0.9)))
        rows.append(make_row("Shuffled gate", seed, -0.010 + 0.006 * (seed % 3 - 0.9) - 1e-5 * seed))
        rows.append(make_row("No gating", seed, -0.0066 + 0.0059 * (seed % 3 - 0.9) + 1e-4 * (-1) ** seed))
    rows += [make_row("FedAvg", seed, -0.2) for seed in range(2)]
    rows += [make_row(method, 0, 0.01, dataset="digits", alpha=0.5) for method in ("FedeKD", "beta 4.0")]
    return [*rows, make_row("FedeKD", 0, -0.1, dataset="retinamnist", metric="rmse", local_mean=1.2, mean=1.1)]


def to_results(rows: list[Row], keys: Any = None) -> pd.DataFrame:
    """Return rows as `load` returns them."""
    return arrange(numeric(pd.DataFrame(rows).fillna("")), keys)


class Helpers:
    make_row = staticmethod(make_row)
    retina_rows = staticmethod(retina_rows)
    example_rows = staticmethod(example_rows)
    to_results = staticmethod(to_results)


@pytest.fixture(scope="session")
def helpers() -> type[Helpers]:
    return Helpers

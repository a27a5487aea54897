"""Rows of results for the tests of the benchmark."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pandas as pd
import pytest

from fedekd.benchmark.results import Row, to_row

PROVENANCE = {"commit": "abc", "device": "cpu", "precision": "32-true", "threads": 1, "code": "c", "data": "d"}


def _row(key: str, method: str = "", coverage: Any = None, **changes: Any) -> Row:
    summary = {
        **{"dataset": "digits", "alpha": 0.1, "seed": 0, "task": "classification", "metric": "accuracy", "rounds": 2},
        **{"mean": 0.75, "worst": 0.5, "local_mean": 0.7, "delta": {"avg": 0.05, "worst": -0.1, "p10": -0.05}},
        **{"clients": [{}, {}], "seconds": 3.14, "bytes_up": 10, "bytes_down": 20},
        "versions": {"fedekd": "0.1.0", "torch": "2"},
        **changes,
    }
    return to_row(key, f"of {method or key}", method or key, summary, PROVENANCE, coverage)


@pytest.fixture(scope="session")
def make_row() -> Callable[..., Row]:
    """Return a function that makes the row of a run from its key and changes of its summary."""
    return _row


@pytest.fixture(scope="session")
def to_frame() -> Callable[..., pd.DataFrame]:
    """Return a function that makes a frame of rows, as `read_results` returns it."""

    def frame(*rows: Row) -> pd.DataFrame:
        return pd.DataFrame(rows).fillna("").set_index("key", drop=False).rename_axis(None)

    return frame

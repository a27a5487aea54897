"""Reading of results, and formatting of tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "results"

#: Column of the results, and its head in the tables.
FIGURES = {"mean": "score", "delta_avg": "Delta avg", "delta_worst": "Delta worst", "delta_tail": "Delta P10/P90"}
#: In place of a table whose results do not exist yet.
NOT_MEASURED = "*Not measured yet.*"


@cache
def read(path: str) -> pd.DataFrame:
    """Read a CSV file below results/; columns `parameter` and `value` mark sweeps."""
    frame = pd.read_csv(RESULTS / path)
    if "method" in frame:
        sweep = frame["method"].str.extract(r"^(beta|lambda_kd) ([\d.]+)$")
        frame["parameter"], frame["value"] = sweep[0], sweep[1].astype(float)
        if frame.duplicated(["method", "dataset", "alpha", "seed"]).any():
            raise ValueError(f"{path}: two rows of one method, alpha and seed")
    return frame


def minus(text: str) -> str:
    """Use the minus sign in place of the hyphen before a number."""
    return text.replace("-", "−")


def spread(values: Iterable[float], signed: bool) -> str:
    """Mean ± sample standard deviation; of one value only the value."""
    series = pd.Series(list(values), dtype=float)
    mean = f"{series.mean():{'+' if signed else ''}.4f}"
    return f"{mean} ± {series.std():.4f}" if len(series) > 1 else mean


def markdown(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)

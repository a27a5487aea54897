"""Results as CSV files: one file per data set, one row per finished run."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from fedekd.errors import UserError
from fedekd.metrics import METRICS
from fedekd.reporting.pages import write_text
from fedekd.reporting.rows import REFERENCES, references_of

#: Columns of every results file. `delta_tail` is the percentile of Delta at the harmful end: the 10th where a higher
#: score is better (accuracy), the 90th where a lower one is (RMSE).
COLUMNS = (
    *("key", "configuration", "dataset", "alpha", "seed", "method", "task", "metric", "rounds", "clients"),
    *("mean", "worst", "local_mean", "delta_avg", "delta_worst", "delta_tail", "bytes_up", "bytes_down"),
    *("seconds", "commit", "fedekd", "torch", "device", "precision", "threads", "code", "data"),
)

#: Columns that may be empty: unknown, or the alpha of sites; files of earlier versions lack the last two.
_OPTIONAL = ("alpha", "commit", "code", "data")

#: Additional columns of runs with exits: accuracy and share of the FLOPs per exit, and per budget in percent.
EXIT_COLUMN = re.compile(r"(exit|budget)_(\d+)(_flops)?")

#: Additional column of runs with `do_no_harm`: the comparison of each client, as JSON.
EVIDENCE = "evidence"

#: Additional column of runs whose exits were calibrated: coverage of the guarantee, as JSON.
COVERAGE = "coverage"

_PARTS = ("avg", "worst", "tail")

#: Additional columns of runs with further references: mean score, differences to the method, and Delta.
REFERENCE_COLUMNS = tuple(
    column
    for score, difference, *_ in REFERENCES.values()
    for column in (f"{score}_mean", *(f"{name}_{part}" for name in (difference, f"{score}_delta") for part in _PARTS))
)

#: Additional columns of runs with `do_no_harm`: Delta of the deployed models.
DEPLOYED_COLUMNS = tuple(f"deployed_delta_{part}" for part in _PARTS)

_EVIDENCE_FIELDS = (
    *("client", "local", "score", "samples", "worse", "better", "gain", "p_value", "deployed"),
    *("candidates", "deployed_score"),
)
_NUMBERS = ("alpha", "mean", "worst", "local_mean", "delta_avg", "delta_worst", "delta_tail", "seconds")

Row = dict[str, str]


def to_row(
    key: str,
    configuration: str,
    method: str,
    summary: Mapping[str, Any],
    provenance: Mapping[str, Any],
    coverage: Sequence[Mapping[str, Any]] | None = None,
) -> Row:
    """Return a run's summary as one row; floats are read back exactly.

    Args:
        key: Hash of the run's configuration and data.
        configuration: Hash of the configuration without the seed.
        method: Label of the method.
        summary: Content of `summary.json`.
        provenance: Commit, device, precision, threads, and the digests of code and data.
        coverage: Coverage of each calibration mode and target risk, if it was measured.
    """
    delta = summary["delta"]
    values = {
        "alpha": "",  # of sites
        **{name: _or_nan(summary[name]) for name in COLUMNS if name in summary},
        **{"key": key, "configuration": configuration, "method": method, "clients": len(summary["clients"])},
        **{"delta_avg": _or_nan(delta["avg"]), "delta_worst": _or_nan(delta["worst"])},
        "delta_tail": _or_nan(next(value for name, value in delta.items() if name.startswith("p"))),
        "seconds": round(summary["seconds"], 1),
        **{name: summary["versions"][name] for name in ("fedekd", "torch")},
        **provenance,
        **_exit_values(summary),
        **_reference_values(summary),
    }
    if "deployed" in summary:
        clients = [{name: client[name] for name in _EVIDENCE_FIELDS if name in client} for client in summary["clients"]]
        values |= _differences("deployed_delta", summary["deployed"]["delta"])
        values[EVIDENCE] = json.dumps({"rule": summary["deployed"]["rule"], "clients": clients})
    if coverage is not None:
        values[COVERAGE] = json.dumps(coverage, separators=(",", ":"))
    columns = (*COLUMNS, *(name for name in values if name not in COLUMNS))
    return {name: repr(values[name]) if isinstance(values[name], float) else str(values[name]) for name in columns}


def _exit_values(summary: Mapping[str, Any]) -> dict[str, float]:
    points = {f"exit_{point['exit']}": point for point in summary.get("exits", ())}
    points |= {f"budget_{round(100 * point['budget'])}": point for point in summary.get("budgets", ())}
    values: dict[str, float] = {}
    for name, point in points.items():
        values |= {name: _or_nan(point["accuracy"]), f"{name}_flops": point["cost"]}
    return values


def _reference_values(summary: Mapping[str, Any]) -> dict[str, float]:
    values: dict[str, float] = {}
    for score, difference, *_ in references_of(summary):
        values[f"{score}_mean"] = _or_nan(summary[f"{score}_mean"])
        values |= _differences(difference, summary[difference])
        values |= _differences(f"{score}_delta", summary[f"{score}_delta"])
    return values


def _differences(name: str, delta: Mapping[str, Any]) -> dict[str, float]:
    tail = next(value for part, value in delta.items() if part.startswith("p"))
    parts = {"avg": delta["avg"], "worst": delta["worst"], "tail": tail}
    return {f"{name}_{part}": _or_nan(value) for part, value in parts.items()}


def _or_nan(value: Any) -> Any:
    """Return NaN for the null of an undefined value."""
    return math.nan if value is None else value


def exit_columns(frame: pd.DataFrame) -> list[str]:
    """Return the exit columns of a frame: exits before budgets, by number."""

    def rank(column: str) -> tuple[bool, int, bool]:
        kind, number, flops = EXIT_COLUMN.fullmatch(column).groups()  # type: ignore[union-attr]
        return kind == "budget", int(number), flops is not None

    return sorted(filter(EXIT_COLUMN.fullmatch, frame.columns), key=rank)


def optional_numbers(frame: pd.DataFrame) -> list[str]:
    """Return the columns of numbers that only some runs have, in order."""
    others = [name for name in (*REFERENCE_COLUMNS, *DEPLOYED_COLUMNS) if name in frame]
    return [*exit_columns(frame), *others]


def read_results(folder: Path) -> pd.DataFrame:
    """Read all results files of a folder.

    Returns:
        One row per run, indexed by key. Values are text, exactly as in the files, and empty where a column does not
        apply. No rows if there are no files.

    Raises:
        UserError: If a file is damaged.
    """
    frames = [frame for path in sorted(folder.glob("*.csv")) if (frame := _read(path)) is not None]
    merged = pd.concat(frames).fillna("") if frames else pd.DataFrame(columns=list(COLUMNS), dtype=str)
    merged = merged.set_index("key", drop=False).rename_axis(None)
    return merged[~merged.index.duplicated(keep="last")]


def _read(path: Path) -> pd.DataFrame | None:
    """Read one file; None for other CSV files, such as metrics.csv of a run."""
    try:
        frame = pd.read_csv(path, dtype=str, keep_default_na=False)
    except ValueError as error:  # of decoding or parsing
        raise UserError(f"{path}: expected a results file of `benchmark`, in UTF-8: {error}") from error
    if "key" not in frame:
        return None
    frame = frame.assign(**{name: "" for name in ("code", "data") if name not in frame})
    frame = frame.reindex(columns=[*COLUMNS, *(name for name in frame if name not in COLUMNS)])
    for column in COLUMNS:
        has_value = frame[column].notna() & (frame[column].ne("") | (column in _OPTIONAL))
        _require(path, column, has_value, frame, "a value")
    for column in (*_NUMBERS, *optional_numbers(frame)):
        values = frame[column].str.lower()
        is_number = pd.to_numeric(values, errors="coerce").notna() | (values == "nan")
        may_be_empty = column == "alpha" or column not in _NUMBERS
        _require(path, column, is_number | ((values == "") & may_be_empty), frame, "a number")
    _require(path, "seed", frame["seed"].str.fullmatch(r"-?\d+"), frame, "a whole number")
    _require(path, "metric", frame["metric"].isin(METRICS), frame, " or ".join(METRICS))
    return frame


def _require(path: Path, column: str, valid: pd.Series, frame: pd.DataFrame, expected: str) -> None:
    """Raise an error for the first row that is not valid."""
    if not valid.all():
        row = int(valid.to_numpy(dtype=bool).argmin())
        raise UserError(f"{path}, line {row + 2}: {column}: expected {expected}, got {frame[column][row]!r}.")


def numeric(results: pd.DataFrame) -> pd.DataFrame:
    """Convert the columns of numbers; NaN where a column does not apply."""
    counts = {name: int for name in ("seed", "rounds", "clients")}
    floats = dict.fromkeys((*_NUMBERS, *optional_numbers(results)), float)
    columns = ("alpha", *optional_numbers(results))
    return results.replace({name: {"": "nan"} for name in columns}).astype(counts | floats)


def distinct_methods(frame: pd.DataFrame) -> pd.DataFrame:
    """Add the configuration to the label of a method that has several.

    Only rows of one configuration may be averaged.
    """
    cells = frame.groupby(["dataset", "alpha", "method"], dropna=False)
    is_single = cells["configuration"].transform("nunique") == 1
    labels = frame["method"] + " (" + frame["configuration"].str[:6] + ")"
    return frame.assign(method=frame["method"].where(is_single, labels))


def write_results(folder: Path, results: pd.DataFrame) -> None:
    """Write sorted rows, one file per data set.

    Files are replaced atomically, and only if their content changes.
    """
    for dataset, group in results.groupby("dataset"):
        alphas = group["alpha"].replace("", "nan").astype(float)
        rows = group.assign(alpha_=alphas, seed_=group["seed"].astype(int))
        rows = rows.sort_values(["method", "alpha_", "seed_", "key"])
        more = [*optional_numbers(rows), EVIDENCE, COVERAGE]
        columns = [*COLUMNS, *(name for name in more if name in rows and rows[name].fillna("").ne("").any())]
        text = rows.to_csv(columns=columns, index=False, lineterminator="\n")
        path = folder / f"{dataset}.csv"
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            write_text(path, text)

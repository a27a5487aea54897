"""Results as rows of small CSV files, one file a data set, that can be committed and read anywhere."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedekd.atomic import atomic_file
from fedekd.errors import UserError

#: The columns of a results file: what was run, what came out, and where from.
COLUMNS = (
    *("key", "configuration", "dataset", "alpha", "seed", "method", "task", "metric", "rounds", "clients"),
    *("mean", "worst", "local_mean", "delta_avg", "delta_worst", "delta_tail", "bytes_up", "bytes_down"),
    *("seconds", "commit", "fedekd", "torch", "device", "precision", "threads"),
)

#: Further columns of runs with exits: accuracy and share of the FLOPs at each exit, and within budgets in percent.
EXIT_COLUMN = re.compile(r"(exit|budget)_(\d+)(_flops)?")

#: A further column of runs with `do_no_harm`: what each client compared, as JSON.
EVIDENCE = "evidence"

#: Further column of runs with checked exit guarantees: the results as JSON.
COVERAGE = "coverage"

#: Characters of a field; Python's own limit is that of some 400 calibrated clients.
_LONGEST = 2**30

_OF_EVIDENCE = ("client", "local", "score", "samples", "worse", "better", "gain", "p_value", "deployed")

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
    """A run's summary as one row; floats are written in the fewest digits that read back the same."""
    delta = summary["delta"]
    tail = next(value for name, value in delta.items() if name.startswith("p"))
    values = {
        "key": key,
        "configuration": configuration,
        "method": method,
        **{name: summary[name] for name in ("dataset", "alpha", "seed", "task", "metric", "rounds", "mean", "worst")},
        "local_mean": summary["local_mean"],
        "clients": len(summary["clients"]),
        "delta_avg": delta["avg"],
        "delta_worst": delta["worst"],
        "delta_tail": tail,
        "bytes_up": summary["bytes_up"],
        "bytes_down": summary["bytes_down"],
        "seconds": round(summary["seconds"], 1),
        "fedekd": summary["versions"]["fedekd"],
        "torch": summary["versions"]["torch"],
        **provenance,
    }
    further = {**_of_exits(summary), **_evidence(summary)}
    if coverage is not None:
        further[COVERAGE] = json.dumps(coverage, separators=(",", ":"))
    values |= further
    columns = (*COLUMNS, *further)
    return {name: repr(values[name]) if isinstance(values[name], float) else str(values[name]) for name in columns}


def _of_exits(summary: Mapping[str, Any]) -> dict[str, float]:
    """The further columns of a run with exits; none of another."""
    found: dict[str, float] = {}
    for line in summary.get("exits", ()):
        name = f"exit_{line['exit']}"
        found |= {name: line["accuracy"], f"{name}_flops": line["cost"]}
    for line in summary.get("budgets", ()):
        name = f"budget_{round(100 * line['budget'])}"
        found |= {name: line["accuracy"], f"{name}_flops": line["cost"]}
    return found


def _evidence(summary: Mapping[str, Any]) -> dict[str, str]:
    """The further column of a run with `do_no_harm`; none of another."""
    if "deployed" not in summary:
        return {}
    clients = [{name: client[name] for name in _OF_EVIDENCE if name in client} for client in summary["clients"]]
    return {EVIDENCE: json.dumps({"rule": summary["deployed"]["rule"], "clients": clients})}


def exit_columns(rows: Iterable[Row]) -> list[str]:
    """The further columns that rows have, exits first, by number."""

    def place(column: str) -> tuple[bool, int, bool]:
        kind, number, flops = EXIT_COLUMN.fullmatch(column).groups()  # type: ignore[union-attr]
        return kind == "budget", int(number), flops is not None

    return sorted({name for row in rows for name in row if name and EXIT_COLUMN.fullmatch(name)}, key=place)


def read_results(folder: Path) -> dict[str, Row]:
    """All rows of a folder's CSV files, by key; none if the folder is not there.

    Raises:
        UserError: If a file is damaged; it names the line.
    """
    csv.field_size_limit(_LONGEST)
    rows: dict[str, Row] = {}
    for path in sorted(folder.glob("*.csv")):
        try:
            with path.open(newline="", encoding="utf-8") as file:
                table = csv.DictReader(file)
                if "key" not in (table.fieldnames or ()):
                    continue  # the metrics.csv of a run, say
                rows |= {row["key"]: row for row in (_checked(row, path, table.line_num) for row in table)}
        except (UnicodeDecodeError, csv.Error) as error:
            raise UserError(f"{path} is no CSV file of results: {error}") from error
    return rows


def _checked(row: dict[Any, Any], path: Path, line: int) -> Row:
    """A row with every column in it, and numbers where there must be some (NaN for a run that diverged)."""
    if lacking := [name for name in COLUMNS if row.get(name) is None]:
        raise UserError(f"{path}, line {line}: no {lacking[0]}; these are no results of benchmark, or they are damaged")
    for name in (*_NUMBERS, *(name for name in exit_columns([row]) if row[name])):
        try:
            float(row[name])
        except ValueError as error:
            raise UserError(f"{path}, line {line}: {name} is {row[name]!r}, and must be a number") from error
    if not row["seed"].lstrip("-").isdecimal():
        raise UserError(f"{path}, line {line}: seed is {row['seed']!r}, and must be a whole number")
    if row["metric"] not in ("accuracy", "rmse"):
        raise UserError(f"{path}, line {line}: metric is {row['metric']!r}, and must be accuracy or rmse")
    return row


def write_results(folder: Path, rows: Iterable[Row]) -> None:
    """Write rows, sorted, into one file a data set, each atomically; a file that would not change is left alone."""
    by_dataset: dict[str, list[Row]] = {}
    for row in rows:
        by_dataset.setdefault(row["dataset"], []).append(row)
    for dataset, own in by_dataset.items():
        own.sort(key=lambda row: (row["method"], float(row["alpha"]), int(row["seed"]), row["key"]))
        text = io.StringIO(newline="")
        further = [*exit_columns(own)]
        further += [name for name in (EVIDENCE, COVERAGE) if any(row.get(name) for row in own)]
        table = csv.DictWriter(text, [*COLUMNS, *further], restval="", extrasaction="ignore", lineterminator="\n")
        table.writeheader()
        table.writerows(own)
        path = folder / f"{dataset}.csv"
        if not path.exists() or path.read_text() != text.getvalue():
            with atomic_file(path) as file:
                file.write(text.getvalue().encode())

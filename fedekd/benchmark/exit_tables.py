"""Committed results on exits as Markdown tables: the CSV files that `report RUN` writes, kept under results/exits/."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from fedekd.errors import UserError, nearest
from fedekd.reporting.pages import minus

Line = Mapping[str, str]


def exit_table(folders: Sequence[Path], argument: str) -> str:
    """A table of one data set, as in `policies/fashionmnist`.

    Args:
        folders: Of results; the tables lie in FOLDER/exits/DATASET/TABLE.csv.
        argument: Which table, and of which data set.

    Raises:
        UserError: If there is no such table; it names the nearest.
    """
    name, _, dataset = argument.partition("/")
    known = {f"{table}/{path.name}" for folder in folders for path in folder.glob("exits/*") for table in _TABLES}
    files = [folder / "exits" / dataset / f"{name}.csv" for folder in folders]
    path = next((path for path in files if path.is_file()), None)
    if path is None or name not in _TABLES:
        raise UserError(f"<!-- fill: exits {argument} -->: no such results; {nearest(argument, known)}")
    with path.open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    return _TABLES[name](lines)


def _exits(lines: Sequence[Line]) -> str:
    exits = sorted({line["exit"] for line in lines}, key=int)
    networks = list(dict.fromkeys(line["network"] for line in lines))
    rows = []
    for network in networks:
        own = {line["exit"]: line for line in lines if line["network"] == network}
        accuracies = [f"{float(own[exit_]['accuracy']):.4f}" for exit_ in exits]
        rows.append([network, *accuracies, f"{float(own[exits[0]]['area']):.4f}"])
    first = {line["exit"]: line for line in lines if line["network"] == networks[0]}
    heads = [f"exit {exit_} ({float(first[exit_]['cost']):.0%} of the FLOPs)" for exit_ in exits]
    return markdown(["network", *heads, "area under accuracy against cost"], rows)


def _policies(lines: Sequence[Line]) -> str:
    times = [column for column in lines[0] if column.startswith("time ratio, ")]
    rows = []
    for line in lines:
        worst = line["worst risk"]
        rows.append(
            [
                line["target risk"],
                f"{float(line['early exits']):.1%}",
                f"{float(worst):.4f}" if worst else "",
                f"{float(line['FLOPs saved']):.1%}",
                minus(f"{float(line['accuracy']):.4f} ({float(line['accuracy change']):+.4f})"),
                *(f"{float(line[column]):.2f}" for column in times),
            ]
        )
    heads = ["alpha", "leave early", "worst exit's risk", "FLOPs saved", "accuracy (change)"]
    return markdown([*heads, *(column.replace("time ratio", "time") for column in times)], rows)


def _validity(lines: Sequence[Line]) -> str:
    alphas = list(dict.fromkeys(line["target risk"] for line in lines))
    rules = list(dict.fromkeys(line["rule"] for line in lines))
    at = {(line["rule"], line["target risk"]): line for line in lines}
    rows = []
    for rule in rules:
        cells = []
        for alpha in alphas:
            line = at[rule, alpha]
            low, high = float(line["CI low"]), float(line["CI high"])
            cells.append(f"{float(line['violation rate']):.3f} ({low:.3f} to {high:.3f})")
        rows.append([f"`{rule}`", *cells, at[rule, alphas[0]]["draws"]])
    return markdown(["rule", *(f"alpha {alpha}" for alpha in alphas), "draws"], rows)


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


_TABLES: dict[str, Callable[[Sequence[Line]], str]] = {"exits": _exits, "policies": _policies, "validity": _validity}

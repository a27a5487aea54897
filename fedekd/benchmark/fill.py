"""Puts results where a Markdown file marks a place for them, so that no figure in it is typed by hand."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from fedekd.benchmark.exit_comparison import exit_comparisons, exit_lines_table
from fedekd.benchmark.exit_tables import exit_table, markdown
from fedekd.benchmark.figures import SWEEP_ALPHA, swept
from fedekd.benchmark.gate import gate_comparisons, gate_finding
from fedekd.benchmark.harm import harm_lines, harm_tables
from fedekd.benchmark.measured import Measured
from fedekd.benchmark.promises import keeping_lines, promise_finding, promise_tables, saving_lines
from fedekd.benchmark.report import SWEPT, verdict_sentence
from fedekd.benchmark.results import read_results
from fedekd.benchmark.table import markdown_table, spread
from fedekd.benchmark.tables import build_tables
from fedekd.errors import UserError, nearest
from fedekd.reporting.pages import minus

#: `<!-- fill: NAME ARGUMENT -->`, what is filled in, `<!-- /fill -->`.
_PLACE = re.compile(r"(<!-- fill: ([^\s>]+) ?([^\s>]*) -->\n)(?:(?!<!-- fill).)*?(<!-- /fill -->)", re.DOTALL)


def fill(text: str, measured: Measured, folders: Sequence[Path] = ()) -> str:
    """A Markdown text with every marked place filled anew.

    Places begin with `<!-- fill: NAME ARGUMENT -->` and end with `<!-- /fill -->`: `methods DATASET` is the table of a
    data set's methods, `sweep beta` that of a parameter, `gate` the finding about the gate's ranking, `verdicts` the
    count of the paper's cells by verdict, `exits TABLE/DATASET` a table of `report` on early exits, `exit-methods GRID`
    the methods with exits of another benchmark whose results lie in the folder GRID, `harm GRID` what do_no_harm is
    worth there, `promises GRID` what its clients' calibrated exits come to.

    Args:
        text: The file's content.
        measured: The results.
        folders: Where the results lie, for tables that are kept as they are.

    Raises:
        UserError: If there is no place, one is not closed, or what it asks for is not known.
    """

    def filled(place: re.Match[str]) -> str:
        name, argument = place[2], place[3]
        if name in _OF_FOLDERS:
            return f"{place[1]}\n{_OF_FOLDERS[name](folders, argument)}\n\n{place[4]}"
        if name not in _WRITERS:
            known = (*_WRITERS, *_OF_FOLDERS)
            raise UserError(f"<!-- fill: {name} -->: nothing is known by that name; {nearest(name, known)}")
        return f"{place[1]}\n{_WRITERS[name](measured, argument)}\n\n{place[4]}"

    result, count = _PLACE.subn(filled, text)
    opened, closed = text.count("<!-- fill:"), text.count("<!-- /fill -->")
    if not opened:
        raise UserError("--fill: the file has no place to fill, as in <!-- fill: gate --> and <!-- /fill --> below it")
    if not opened == closed == count:
        raise UserError(f"--fill: of {opened} places <!-- fill: ... --> {count} are closed by <!-- /fill -->")
    return result


def _of_grid(folders: Sequence[Path], grid: str) -> Measured:
    """The results of another benchmark, which lie in a folder of their own below these."""
    return Measured(row for folder in folders for row in read_results(folder / grid).values())


def _exit_methods(folders: Sequence[Path], grid: str) -> str:
    comparisons = exit_comparisons(_of_grid(folders, grid))
    if not comparisons:
        raise UserError(f"<!-- fill: exit-methods {grid} -->: no results of methods with exits in {grid}/")
    parts = []
    for comparison in comparisons:
        heads, *lines = exit_lines_table(comparison)
        parts += [markdown([comparison.name, *heads[1:]], lines), "", minus(comparison.finding), ""]
    return "\n".join(parts).rstrip()


def _harm(folders: Sequence[Path], grid: str) -> str:
    tables = harm_tables(_of_grid(folders, grid))
    if not tables:
        raise UserError(f"<!-- fill: harm {grid} -->: no results of runs with do_no_harm in {grid}/")
    parts = []
    for table in tables:
        heads, *lines = harm_lines(table)
        parts.append(markdown([f"{table.name}, confidence {table.confidence:g}", *heads[1:]], lines))
    return "\n\n".join(parts)


def _promises(folders: Sequence[Path], grid: str) -> str:
    tables = promise_tables(_of_grid(folders, grid))
    if not tables:
        raise UserError(f"<!-- fill: promises {grid} -->: no results of calibrated clients in {grid}/")
    parts = []
    for table in tables:
        for heads, *lines in (saving_lines(table), keeping_lines(table)):
            parts.append(markdown([table.name, *heads[1:]], lines))
        parts += promise_finding(table)
    return "\n\n".join(parts)


def _methods(measured: Measured, dataset: str) -> str:
    if dataset not in measured.datasets:
        raise UserError(f"<!-- fill: methods {dataset} -->: no such results; {nearest(dataset, measured.datasets)}")
    methods = measured.methods(dataset)
    return markdown_table(row for row in measured.rows if row["dataset"] == dataset and row["method"] in methods)


def _sweep(measured: Measured, parameter: str) -> str:
    parameters = [name for name, _ in SWEPT.values()]
    if parameter not in parameters:
        raise UserError(f"<!-- fill: sweep {parameter} -->: no such parameter; {nearest(parameter, parameters)}")
    data = swept(measured, parameter)
    if not data:
        return "Nothing was run."
    values = sorted({value for by_value in data.values() for value in by_value})
    heads = " | ".join(f"{parameter} {value:g}" for value in values)
    lines = [
        f"| average Delta at alpha {SWEEP_ALPHA} | {heads} | seeds |",
        f"| --- | {' | '.join('---' for _ in values)} | --- |",
    ]
    for dataset, by_value in data.items():
        cells = [spread(list(by_value[value].values()), True) if value in by_value else "" for value in values]
        seeds = len(next(iter(by_value.values())))
        lines.append(f"| {dataset}, {measured.metric(dataset)} | {' | '.join(cells)} | {seeds} |")
    return "\n".join(lines)


def _gate(measured: Measured, argument: str) -> str:
    finding = gate_finding(gate_comparisons(measured))
    return "\n".join((finding.summary, "", *(f"- {sentence}" for sentence in finding.places)))


def _verdicts(measured: Measured, argument: str) -> str:
    return verdict_sentence(build_tables(measured))


_WRITERS: dict[str, Callable[[Measured, str], str]] = {
    "methods": _methods,
    "sweep": _sweep,
    "gate": _gate,
    "verdicts": _verdicts,
}

#: What is filled from files below the folders, not from their measured rows.
_OF_FOLDERS: dict[str, Callable[[Sequence[Path], str], str]] = {
    "exits": exit_table,
    "exit-methods": _exit_methods,
    "harm": _harm,
    "promises": _promises,
}

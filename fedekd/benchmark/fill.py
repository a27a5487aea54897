"""Puts results where a Markdown file marks a place for them, so that no figure in it is typed by hand."""

from __future__ import annotations

import re
from collections.abc import Callable

from fedekd.benchmark.figures import SWEEP_ALPHA, swept
from fedekd.benchmark.gate import gate_finding
from fedekd.benchmark.measured import Measured
from fedekd.benchmark.report import verdicts
from fedekd.benchmark.table import markdown_table, spread
from fedekd.benchmark.tables import SWEEPS, build_tables
from fedekd.errors import UserError, nearest

#: `<!-- fill: NAME ARGUMENT -->`, what is filled in, `<!-- /fill -->`.
_PLACE = re.compile(r"(<!-- fill: (\w+) ?([\w,.]*) -->\n)(.*?)(<!-- /fill -->)", re.DOTALL)


def fill(text: str, measured: Measured) -> str:
    """A Markdown text with every marked place filled anew.

    Places begin with `<!-- fill: NAME ARGUMENT -->` and end with `<!-- /fill -->`: `methods DATASET` is the table of a
    data set's methods, `sweep beta` that of a parameter, `gate` the finding about the gate's ranking, `verdicts` the
    count of the paper's cells by verdict.

    Args:
        text: The file's content.
        measured: The results.

    Raises:
        UserError: If a place has a name that is not known.
    """

    def filled(place: re.Match[str]) -> str:
        name, argument = place[2], place[3]
        if name not in _WRITERS:
            raise UserError(f"<!-- fill: {name} -->: nothing is known by that name; {nearest(name, _WRITERS)}")
        return f"{place[1]}\n{_WRITERS[name](measured, argument)}\n\n{place[5]}"

    return _PLACE.sub(filled, text)


def _methods(measured: Measured, dataset: str) -> str:
    rows = [r for r in measured.rows if r["dataset"] == dataset and not r["method"].startswith(SWEEPS)]
    return markdown_table(rows) if rows else "Nothing was run."


def _sweep(measured: Measured, parameter: str) -> str:
    data = swept(measured, parameter)
    values = sorted({value for by_value in data.values() for value in by_value})
    heads = " | ".join(f"{parameter} {value:g}" for value in values)
    lines = [
        f"| average Delta at alpha {SWEEP_ALPHA} | {heads} | seeds |",
        f"| --- | {' | '.join('---' for _ in values)} | --- |",
    ]
    for dataset, by_value in data.items():
        cells = [spread(list(by_value[value].values()), True) if value in by_value else "" for value in values]
        seeds = max(len(of_seed) for of_seed in by_value.values())
        lines.append(f"| {dataset}, {measured.metric(dataset)} | {' | '.join(cells)} | {seeds} |")
    return "\n".join(lines)


def _gate(measured: Measured, argument: str) -> str:
    finding = gate_finding(measured)
    return "\n".join((finding.summary, "", *(f"- {sentence}" for sentence in finding.places)))


def _verdicts(measured: Measured, argument: str) -> str:
    counts = verdicts(build_tables(measured))
    told = ", ".join(f"{verdict} {count}" for verdict, count in sorted(counts.items(), key=lambda kv: -kv[1]))
    return f"Of the paper's {sum(counts.values())} cells: {told}."


_WRITERS: dict[str, Callable[[Measured, str], str]] = {
    "methods": _methods,
    "sweep": _sweep,
    "gate": _gate,
    "verdicts": _verdicts,
}

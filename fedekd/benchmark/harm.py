"""What do_no_harm is worth: Delta before and after, for any margin, from what the clients of finished runs compared."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import TYPE_CHECKING, Any

from fedekd.benchmark.measured import Measured, title
from fedekd.benchmark.results import EVIDENCE, Row
from fedekd.benchmark.table import spread
from fedekd.do_no_harm.power import acceptance_probability
from fedekd.do_no_harm.rule import DoNoHarm
from fedekd.reporting.figures import BLACK, CLIENT_COLOURS
from fedekd.reporting.pages import minus

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Margins that are told of, in accuracy.
MARGINS = (0.0, 0.005, 0.01, 0.02)


@dataclass(frozen=True)
class HarmLine:
    """One method at one margin, over seeds.

    Attributes:
        method: Its label.
        rule: `everyone takes it`, or the margin.
        avg: Mean Delta of a run, by seed.
        worst: Worst Delta of a run, by seed.
        taken: Share of the clients that take the federated model, all seeds together.
    """

    method: str
    rule: str
    avg: tuple[float, ...]
    worst: tuple[float, ...]
    taken: float


@dataclass(frozen=True)
class HarmTable:
    """The methods at one place.

    Attributes:
        dataset: The data set.
        alpha: Concentration of its partition.
        confidence: Of the certificates.
        samples: Mean size of a holdout split.
        differing: Mean share of its samples that one of the two models gets right and the other wrong.
        lines: By method and margin.
    """

    dataset: str
    alpha: float
    confidence: float
    samples: float
    differing: float
    lines: tuple[HarmLine, ...]

    @property
    def name(self) -> str:
        """Its data set and alpha, to be read."""
        return f"{title(self.dataset)}, alpha {self.alpha:g}"


def harm_tables(measured: Measured) -> list[HarmTable]:
    """A table for every data set and alpha at which clients compared, by classes, what they had."""
    places: dict[tuple[str, float], list[Row]] = {}
    for row in measured.rows:
        if row["metric"] == "accuracy" and row.get(EVIDENCE):
            places.setdefault((row["dataset"], float(row["alpha"])), []).append(row)
    return [_table(*place, rows) for place, rows in sorted(places.items())]


def _table(dataset: str, alpha: float, rows: Sequence[Row]) -> HarmTable:
    runs: dict[str, list[Sequence[Mapping[str, Any]]]] = {}
    rules = []
    for row in sorted(rows, key=lambda row: (row["method"], int(row["seed"]))):
        evidence = json.loads(row[EVIDENCE])
        # A client that has taken part in no round has compared nothing, and has nothing but its local model.
        runs.setdefault(row["method"], []).append([each for each in evidence["clients"] if "samples" in each])
        rules.append(DoNoHarm(**evidence["rule"]))
    everyone = [client for of_method in runs.values() for clients in of_method for client in clients]
    # One look, at the end, is what the counts are of.
    rule = replace(rules[0], looks=1, rule="certified")
    lines = [line for method, of_method in runs.items() for line in _lines(method, of_method, rule)]
    return HarmTable(
        dataset,
        alpha,
        rule.confidence,
        fmean(client["samples"] for client in everyone),
        fmean((client["worse"] + client["better"]) / client["samples"] for client in everyone),
        tuple(lines),
    )


def _lines(method: str, runs: Sequence[Sequence[Mapping[str, Any]]], rule: DoNoHarm) -> list[HarmLine]:
    def line(name: str, takes: Sequence[Sequence[bool]]) -> HarmLine:
        changes = [
            [client["score"] - client["local"] if taken else 0.0 for client, taken in zip(clients, chosen, strict=True)]
            for clients, chosen in zip(runs, takes, strict=True)
        ]
        taken = fmean(each for chosen in takes for each in chosen)
        return HarmLine(method, name, tuple(map(fmean, changes)), tuple(map(min, changes)), taken)

    found = [line("everyone takes it", [[True] * len(clients) for clients in runs])]
    for margin in MARGINS:
        with_margin = replace(rule, margin=margin)
        certified = [
            [with_margin.p_value(c["worse"], c["better"], c["samples"]) <= rule.level for c in clients]
            for clients in runs
        ]
        found.append(line(f"margin {margin:g}", certified))
    return found


def harm_lines(table: HarmTable) -> list[list[str]]:
    """The heads and the lines of a table, as text."""
    found = [["method", "who takes the federated model", "take it", "Delta avg", "Delta worst", "seeds"]]
    for line in table.lines:
        avg, worst = (minus(spread(values, signed=True)) for values in (line.avg, line.worst))
        found.append([line.method, line.rule, f"{line.taken:.0%}", avg, worst, str(len(line.avg))])
    return found


def power_curves(table: HarmTable) -> Figure:
    """The probability that a client takes the federated model, against its gain; exact, for several sizes of split."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 4.0), layout="constrained")
    gains = [step / 1000 for step in range(-20, 31, 2)]
    for axes, margin in zip(figure.subplots(1, 2, sharey=True), (0.0, 0.01), strict=True):
        for colour, samples in zip(CLIENT_COLOURS, sorted({300, round(table.samples), 2300, 7000}), strict=False):
            rule = DoNoHarm(confidence=table.confidence, margin=margin)
            within = [gain for gain in gains if abs(gain) <= table.differing]
            likely = [acceptance_probability(rule, gain, table.differing, samples) for gain in within]
            axes.plot(within, likely, color=colour, label=f"n = {samples:,}")
        axes.axhline(1 - table.confidence, color=BLACK, linewidth=0.8, linestyle="--")
        axes.axvline(-margin, color=BLACK, linewidth=0.8, linestyle=":")
        axes.set_title(f"margin {margin:g}, the models differ on {table.differing:.1%}", fontsize=10)
        axes.set_xlabel("true gain in accuracy")
        axes.grid(color="#E5E5E5", linewidth=0.8)
    figure.axes[0].set_ylabel("probability of taking it")
    figure.axes[0].legend(frameon=False, fontsize=8)
    return figure

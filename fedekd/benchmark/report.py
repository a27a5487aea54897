"""All that can be told of results: held against the paper, against each other, and where they come from."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedekd.benchmark import figures
from fedekd.benchmark.comparisons import COMPARED, Comparison, Standing, against, standings
from fedekd.benchmark.datasets import DatasetLine, dataset_lines
from fedekd.benchmark.exit_comparison import ExitComparison, exit_comparisons, exit_curves
from fedekd.benchmark.gate import GateFinding, gate_comparisons, gate_finding
from fedekd.benchmark.harm import HarmTable, harm_tables, power_curves
from fedekd.benchmark.measured import Measured, title
from fedekd.benchmark.promises import PromiseTable, promise_tables
from fedekd.benchmark.published import DEPARTURES
from fedekd.benchmark.tables import Entry, Table, build_tables

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: The swept parameters by the number of the paper's figure, and what they are.
SWEPT = {3: ("beta", "the sharpness of the gate"), 4: ("lambda_kd", "the weight of the distillation")}


@dataclass(frozen=True)
class Drawing:
    """A figure of the report.

    Attributes:
        name: Of its file.
        title: What it shows.
        figure: The drawing; None if nothing of it was run.
        told: The same in words, for those who cannot see it.
    """

    name: str
    title: str
    figure: Figure | None
    told: str


@dataclass(frozen=True)
class Report:
    """All that a report tells.

    Attributes:
        tables: Tables 1, 2 and 4-10.
        datasets: Table 3.
        drawings: Figures 2-4 and the rankings.
        sweeps: By parameter what Figures 3 and 4 are drawn of.
        standings: What the rankings are drawn of.
        comparisons: Paired tests of FedeKD against the other methods.
        gate: Of gate, shuffled weights and none.
        gate_finding: The same in words.
        exits: Methods with early exits against each other.
        harm: What do_no_harm is worth.
        promises: What calibrated exits come to, client by client.
        departures: Where the runs are knowingly not the paper's, by data set.
        provenance: Where the results come from, one entry a kind, with the number of runs.
        sources: What the report was made of.
    """

    tables: Sequence[Table]
    datasets: Sequence[DatasetLine]
    drawings: Sequence[Drawing]
    sweeps: Mapping[str, Mapping[str, Mapping[float, dict[int, float]]]]
    standings: Sequence[Standing]
    comparisons: Sequence[Comparison]
    gate: Sequence[Comparison]
    gate_finding: GateFinding
    exits: Sequence[ExitComparison]
    harm: Sequence[HarmTable]
    promises: Sequence[PromiseTable]
    departures: Mapping[str, str]
    provenance: Sequence[tuple[Mapping[str, str], int]]
    sources: Sequence[str]

    @property
    def counts(self) -> Mapping[str, int]:
        """How many of the paper's printed cells have which verdict, most first."""
        return count_verdicts(self.tables)

    @property
    def verdict_sentence(self) -> str:
        """The same in a sentence."""
        return verdict_sentence(self.tables)


def _printed(tables: Sequence[Table]) -> Iterator[Entry]:
    for table in tables:
        for *_, entry in table.entries():
            if entry.paper is not None and not entry.paper.derived:
                yield entry


def count_verdicts(tables: Sequence[Table]) -> Mapping[str, int]:
    """How many of the paper's printed cells have which verdict, most first."""
    return dict(Counter(entry.verdict for entry in _printed(tables)).most_common())


def verdict_sentence(tables: Sequence[Table]) -> str:
    """As in `Of the paper's 456 cells: not run 372, differs 52 (41 of them marked as faulty), agrees 32.`."""
    counts = count_verdicts(tables)
    faulty = sum(entry.verdict == "differs" and bool(entry.paper and entry.paper.fault) for entry in _printed(tables))
    told = [
        f"{verdict} {count}" + (f" ({faulty} of them marked as faulty)" if verdict == "differs" and faulty else "")
        for verdict, count in counts.items()
    ]
    return f"Of the paper's {sum(counts.values())} cells: {', '.join(told)}."


def make_report(measured: Measured, root: str, sources: Sequence[str]) -> Report:
    """Work everything out.

    Args:
        measured: The results.
        root: Folder of the data files, for Table 3.
        sources: What the results were read from.
    """
    tables, ranked, gate = build_tables(measured), standings(measured), gate_comparisons(measured)
    exits, harm = exit_comparisons(measured), harm_tables(measured)
    sweeps = {parameter: figures.swept(measured, parameter) for parameter, _ in SWEPT.values()}
    return Report(
        tables=tables,
        datasets=dataset_lines(root, [name for name in measured.datasets if "," not in name]),
        drawings=[*_drawings(measured, tables), *map(_ranking, ranked), *map(_exit_drawing, exits), *map(_power, harm)],
        sweeps=sweeps,
        standings=ranked,
        comparisons=against(measured),
        gate=gate,
        gate_finding=gate_finding(gate),
        exits=exits,
        harm=harm,
        promises=promise_tables(measured),
        departures={title(name): told for name, told in DEPARTURES.items() if name in measured.datasets},
        provenance=_provenance(measured),
        sources=list(sources),
    )


def _drawings(measured: Measured, tables: Sequence[Table]) -> Iterator[Drawing]:
    told = "The same figures stand in Tables 8 and 9."
    yield Drawing("figure2", "Figure 2. Mean scores at alpha 0.1", figures.scores(tables), told)
    for number, (parameter, meaning) in SWEPT.items():
        drawn = figures.sweep(measured, parameter)
        told = "" if drawn is None else "Grey: single seeds; blue: their mean, with one standard deviation."
        yield Drawing(f"figure{number}", f"Figure {number}. Average Delta over {parameter}, {meaning}", drawn, told)


def _ranking(standing: Standing) -> Drawing:
    heading = f"{title(standing.dataset)}: methods ranked by {COMPARED[standing.measure]}"
    alphas = ", ".join(f"{alpha:g}" for alpha in standing.alphas)
    ranks = ", ".join(f"{name} {value:.2f}" for name, value in standing.ranking.mean_ranks.items())
    told = f"Alpha {alphas}, {standing.ranking.repetitions} runs a method; mean ranks: {ranks}."
    if standing.omitted:
        told += f" Left out for too few runs: {', '.join(standing.omitted)}."
    name = f"ranking-{_slug(standing.dataset)}-{standing.measure.removeprefix('delta_')}"
    return Drawing(name, heading, figures.critical_difference(standing.ranking, heading), told)


def _exit_drawing(comparison: ExitComparison) -> Drawing:
    heading = f"{comparison.name}: accuracy against FLOPs"
    return Drawing(f"exits-{_slug(comparison.name)}", heading, exit_curves(comparison), comparison.finding)


def _power(table: HarmTable) -> Drawing:
    heading = f"{table.name}: what a certificate can see"
    told = (
        f"The probability, exact, that a client takes the federated model, by its true gain and the size n of the"
        f" holdout split, where the two models differ on {table.differing:.1%} of the samples. Dashed: delta;"
        " dotted: where harm begins."
    )
    return Drawing(f"power-{_slug(table.name)}", heading, power_curves(table), told)


def _slug(name: str) -> str:
    return re.sub("[^a-z0-9]+", "-", name.lower())


def _provenance(measured: Measured) -> list[tuple[Mapping[str, str], int]]:
    kinds = ("dataset", "commit", "fedekd", "torch", "device", "precision", "threads")
    counts = Counter(tuple(row[name] for name in kinds) for row in measured.rows)
    return [(dict(zip(kinds, kind, strict=True)), count) for kind, count in sorted(counts.items())]

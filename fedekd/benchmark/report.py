"""All that can be told of results: held against the paper, against each other, and where they come from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedekd.benchmark import figures
from fedekd.benchmark.comparisons import COMPARED, Comparison, against, rankings
from fedekd.benchmark.datasets import DatasetLine, dataset_lines
from fedekd.benchmark.gate import GateFinding, gate_comparisons, gate_finding
from fedekd.benchmark.measured import Measured
from fedekd.benchmark.published import DATASETS
from fedekd.benchmark.tables import Table, build_tables

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Drawing:
    """A figure of the report.

    Attributes:
        name: Of its files.
        title: What it shows.
        figure: The drawing.
    """

    name: str
    title: str
    figure: Figure


@dataclass(frozen=True)
class Report:
    """All that a report tells.

    Attributes:
        tables: Tables 1, 2 and 4-10.
        datasets: Table 3.
        drawings: Figures 2-4 and the rankings.
        comparisons: Paired tests of FedeKD against the other methods.
        gate: Of the gate against shuffled weights and none.
        gate_finding: The same in words.
        provenance: Where the results come from, one entry a kind, with the number of runs.
        sources: What the report was made of.
    """

    tables: Sequence[Table]
    datasets: Sequence[DatasetLine]
    drawings: Sequence[Drawing]
    comparisons: Sequence[Comparison]
    gate: Sequence[Comparison]
    gate_finding: GateFinding
    provenance: Sequence[tuple[Mapping[str, str], int]]
    sources: Sequence[str]

    @property
    def verdicts(self) -> Mapping[str, int]:
        """How many of the paper's printed cells have which verdict."""
        return verdicts(self.tables)


def verdicts(tables: Sequence[Table]) -> Mapping[str, int]:
    """How many of the paper's printed cells have which verdict."""
    return Counter(
        entry.verdict
        for table in tables
        for _, _, _, entry in table.entries()
        if entry.paper is not None and not entry.paper.derived
    )


def make_report(measured: Measured, root: str, sources: Sequence[str]) -> Report:
    """Work everything out.

    Args:
        measured: The results.
        root: Folder of the data files, for Table 3.
        sources: What the results were read from.
    """
    tables = build_tables(measured)
    known = [name for name in measured.datasets if not name.endswith("other options")]
    return Report(
        tables=tables,
        datasets=dataset_lines(root, known),
        drawings=_drawings(measured, tables),
        comparisons=against(measured),
        gate=gate_comparisons(measured),
        gate_finding=gate_finding(measured),
        provenance=_provenance(measured),
        sources=list(sources),
    )


def _drawings(measured: Measured, tables: Sequence[Table]) -> list[Drawing]:
    found = [Drawing("figure2", "Figure 2: mean scores at alpha 0.1", figures.scores(tables))]
    for number, parameter, meaning in (
        (3, "beta", "the sharpness of the gate"),
        (4, "lambda_kd", "the weight of the distillation"),
    ):
        drawn = figures.sweep(measured, parameter)
        if drawn is not None:
            found.append(Drawing(f"figure{number}", f"Figure {number}: average Delta over {meaning}", drawn))
    for dataset, measure, ranking in rankings(measured):
        title = f"{DATASETS.get(dataset, dataset)}: methods ranked by {COMPARED[measure]}"
        drawing = figures.critical_difference(ranking, title)
        found.append(Drawing(f"ranking-{dataset}-{measure.removeprefix('delta_')}", title, drawing))
    return found


def _provenance(measured: Measured) -> list[tuple[Mapping[str, str], int]]:
    kinds = ("dataset", "commit", "fedekd", "torch", "device", "precision", "threads")
    counts = Counter(tuple(row[name] for name in kinds) for row in measured.rows)
    return [(dict(zip(kinds, kind, strict=True)), count) for kind, count in sorted(counts.items())]

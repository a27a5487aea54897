"""The paper's tables with our figures beside its own, cell by cell (Tables 1, 2, 4-10)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from statistics import stdev
from typing import Literal

from fedekd.benchmark.measured import Measured, title
from fedekd.benchmark.published import ALPHAS, DATASETS, SEEDS, PublishedCell, published
from fedekd.benchmark.statistics import LEVEL, MIN_SEEDS, welch

Verdict = Literal[
    "agrees", "differs", "too few seeds", "not run", "not in the paper", "no spread in the paper", "diverged"
]


@dataclass(frozen=True)
class Entry:
    """A cell: ours beside the paper's.

    Attributes:
        values: Ours by seed.
        paper: The paper's cell, if there is one.
        best: Whether our mean is the best of the column.
    """

    values: dict[int, float]
    paper: PublishedCell | None
    best: bool = False

    @property
    def mean(self) -> float | None:
        """Our mean over seeds."""
        return math.fsum(self.values.values()) / len(self.values) if self.values else None

    @property
    def std(self) -> float | None:
        """Our sample standard deviation over seeds."""
        return stdev(self.values.values()) if len(self.values) > 1 and not self.diverged else None

    @property
    def diverged(self) -> bool:
        """Whether a run ended without a score."""
        return any(math.isnan(value) for value in self.values.values())

    @property
    def p(self) -> float | None:
        """Of Welch's t-test against the paper, where both sides have a spread to speak of."""
        if self.paper is None or self.paper.std is None or len(self.values) < MIN_SEEDS or self.diverged:
            return None
        return welch(list(self.values.values()), self.paper.mean, self.paper.std, SEEDS)

    @property
    def verdict(self) -> Verdict:
        """What is to be said of ours beside the paper's."""
        if not self.values:
            return "not run"
        if self.diverged:
            return "diverged"
        if self.paper is None:
            return "not in the paper"
        if len(self.values) < MIN_SEEDS:
            return "too few seeds"
        if self.p is None:
            return "no spread in the paper"
        return "agrees" if self.p > LEVEL else "differs"


@dataclass(frozen=True)
class Panel:
    """One data set of a table: methods by alphas.

    Attributes:
        dataset: Our name of the data set.
        title: Its name to be read.
        alphas: The columns.
        rows: By method, an entry an alpha.
    """

    dataset: str
    title: str
    alphas: tuple[float, ...]
    rows: dict[str, tuple[Entry, ...]]


@dataclass(frozen=True)
class Table:
    """A table of the paper, one panel a data set.

    Attributes:
        number: As in the paper.
        title: What it tells.
        measure: The column of the results.
        higher_is_better: As it says.
        panels: What was run, then what was not; in each the paper's data sets in its order, then others.
    """

    number: int
    title: str
    measure: str
    higher_is_better: bool
    panels: tuple[Panel, ...]

    @property
    def name(self) -> str:
        """Name of its files."""
        return f"table{self.number:02d}"

    def entries(self) -> Iterator[tuple[Panel, str, float, Entry]]:
        """All cells, with their panel, method and alpha."""
        for panel in self.panels:
            for method, row in panel.rows.items():
                for alpha, entry in zip(panel.alphas, row, strict=True):
                    yield panel, method, alpha, entry


@dataclass(frozen=True)
class _Plan:
    """What one of the paper's tables holds."""

    number: int
    title: str
    measure: str
    metric: str
    higher_is_better: bool


_PLANS = (
    _Plan(1, "Average Delta, classification", "delta_avg", "accuracy", True),
    _Plan(2, "Average Delta, regression", "delta_avg", "rmse", False),
    _Plan(4, "Worst Delta, classification", "delta_worst", "accuracy", True),
    _Plan(5, "Worst Delta, regression", "delta_worst", "rmse", False),
    _Plan(6, "P10 of Delta, classification", "delta_tail", "accuracy", True),
    _Plan(7, "P90 of Delta, regression", "delta_tail", "rmse", False),
    _Plan(8, "Mean accuracy", "mean", "accuracy", True),
    _Plan(9, "Mean RMSE", "mean", "rmse", False),
    _Plan(10, "Average Delta by energy, classification", "delta_avg", "accuracy", True),
)

#: The paper's rows of every table but 10, and those of 10; then what we add.
_ROWS = ("Local", "FedDyn", "FedProx", "FedAvg", "FedType, FedProx", "FedType", "FedeKD")
_ENERGY_ROWS = ("No gating", "Entropy", "Margin", "LogSumExp", "Feature", "FedeKD")
_ABLATIONS = frozenset({"Entropy", "Margin", "LogSumExp", "Feature"})


def build_tables(measured: Measured) -> list[Table]:
    """Tables 1, 2 and 4-10 (3, the data sets, is not made of runs)."""
    return [_table(plan, measured) for plan in _PLANS]


def _table(plan: _Plan, measured: Measured) -> Table:
    cells = {cell.place: cell for cell in published() if cell.table == plan.number}
    of_paper = [name for name in DATASETS if any(place[1] == name for place in cells)]
    ours = [name for name in measured.datasets if measured.metric(name) == plan.metric and name not in of_paper]
    panels = [_panel(plan, name, cells, measured) for name in (*of_paper, *ours)]
    panels.sort(key=lambda panel: panel.dataset not in measured.datasets)  # what was run comes first
    return Table(plan.number, plan.title, plan.measure, plan.higher_is_better, tuple(p for p in panels if p.rows))


def _panel(plan: _Plan, dataset: str, cells: dict[tuple[str, str, float], PublishedCell], measured: Measured) -> Panel:
    alphas = tuple(sorted({*measured.alphas(dataset), *(ALPHAS if dataset in DATASETS else ())}))
    rows: dict[str, tuple[Entry, ...]] = {}
    for method in _methods(plan, dataset, measured):
        row = tuple(
            Entry(measured.values(plan.measure, method, dataset, alpha), cells.get((method, dataset, alpha)))
            for alpha in alphas
        )
        if any(entry.values or entry.paper for entry in row):
            rows[method] = row
    return Panel(dataset, title(dataset), alphas, _with_best(rows, plan.higher_is_better))


def _methods(plan: _Plan, dataset: str, measured: Measured) -> list[str]:
    """The rows of a panel: the paper's, then the others that were run."""
    run = measured.methods(dataset)
    if plan.number == 10:
        return [*_ENERGY_ROWS, *(method for method in run if method == "Shuffled gate")]
    return [*_ROWS, *sorted(method for method in run if method not in _ROWS and method not in _ABLATIONS)]


def _with_best(rows: dict[str, tuple[Entry, ...]], higher_is_better: bool) -> dict[str, tuple[Entry, ...]]:
    """The rows with the best of each column marked.

    Only methods over the same seeds, as many as any has, can be held against each other by their means.
    """
    marked = {method: list(row) for method, row in rows.items()}
    for column in range(len(next(iter(rows.values()), ()))):
        entries = {method: row[column] for method, row in rows.items() if not row[column].diverged}
        seeds = max((tuple(entry.values) for entry in entries.values()), key=len, default=())
        full = {method: entry for method, entry in entries.items() if tuple(entry.values) == seeds}
        means = {method: entry.mean for method, entry in full.items() if entry.mean is not None}
        if len(seeds) >= MIN_SEEDS and len(means) > 1:
            best = (max if higher_is_better else min)(means.values())
            for method, value in means.items():
                if value == best:
                    marked[method][column] = replace(entries[method], best=True)
    return {method: tuple(row) for method, row in marked.items()}

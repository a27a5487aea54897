"""Methods with early exits held against each other: accuracy at each exit, within budgets, and what it costs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

from fedekd.benchmark.measured import Measured, title
from fedekd.benchmark.results import EXIT_COLUMN, Row
from fedekd.benchmark.table import spread
from fedekd.early_exit.cost_curves import Point, cost_of
from fedekd.reporting.figures import BLACK, CLIENT_COLOURS
from fedekd.reporting.pages import minus

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Budgets that are shown, in percent of the plain network's FLOPs.
SHOWN = (25, 50, 75)


@dataclass(frozen=True)
class ExitLine:
    """One method, means over seeds.

    Attributes:
        method: Its label.
        seeds: Over which.
        accuracies: At the last exit, by seed.
        exits: Cost and accuracy of each exit, if all images leave there.
        budgets: The same by budget, in percent of the plain network's FLOPs.
        saved: Share of the FLOPs that it saves at the accuracy of the best method without exits, over the seeds that
            both have; NaN if it does not come to that accuracy, None if there is nothing to hold it against.
    """

    method: str
    seeds: tuple[int, ...]
    accuracies: tuple[float, ...]
    exits: tuple[Point, ...]
    budgets: Mapping[int, Point]
    saved: float | None


@dataclass(frozen=True)
class ExitComparison:
    """The methods with exits at one place.

    Attributes:
        dataset: The data set.
        alpha: Concentration of its partition.
        clients: How many.
        rounds: How many.
        plain: Label and mean accuracy of the best method without exits; None if none was run.
        lines: By falling accuracy.
    """

    dataset: str
    alpha: float
    clients: int
    rounds: int
    plain: tuple[str, float] | None
    lines: tuple[ExitLine, ...]

    @property
    def name(self) -> str:
        """Its data set and alpha, to be read."""
        return f"{title(self.dataset)}, alpha {self.alpha:g}, {self.clients} clients, {self.rounds} rounds"

    @property
    def finding(self) -> str:
        """In a sentence: who reaches the accuracy of the best method without exits, and at what cost."""
        if self.plain is None:
            return "No method without exits was run beside these."
        label, accuracy = self.plain
        reaching = [line for line in self.lines if line.saved is not None and not math.isnan(line.saved)]
        # Not by commas, which some labels have.
        told = "; ".join(f"{line.method} {line.saved:.0%}" for line in sorted(reaching, key=lambda line: -_saved(line)))
        missing = [line.method for line in self.lines if line.saved is not None and math.isnan(line.saved)]
        text = f"Best without exits: {label}, {accuracy:.4f}. At that accuracy FLOPs are saved by: {told or 'nobody'}"
        return f"{text}. It is not reached by: {'; '.join(missing)}." if missing else f"{text}."


def _saved(line: ExitLine) -> float:
    return line.saved if line.saved is not None else -math.inf


def exit_comparisons(measured: Measured) -> list[ExitComparison]:
    """A comparison for every data set, alpha and number of clients and rounds at which there is a method with exits."""
    places: dict[tuple[str, float, int, int], list[Row]] = {}
    for row in measured.rows:
        if row["metric"] == "accuracy" and not math.isnan(float(row["mean"])):
            place = row["dataset"], float(row["alpha"]), int(row["clients"]), int(row["rounds"])
            places.setdefault(place, []).append(row)
    return [_comparison(*place, rows) for place, rows in sorted(places.items()) if any(map(_has_exits, rows))]


def _has_exits(row: Row) -> bool:
    return bool(row.get("exit_2"))


def _comparison(dataset: str, alpha: float, clients: int, rounds: int, rows: Sequence[Row]) -> ExitComparison:
    by_method: dict[str, dict[int, Row]] = {}
    plain: dict[str, dict[int, float]] = {}
    for row in rows:
        seed = int(row["seed"])
        if _has_exits(row):
            by_method.setdefault(row["method"], {})[seed] = row
        else:
            plain.setdefault(row["method"], {})[seed] = float(row["mean"])
            # The same of all methods whose clients train their private models in as many rounds; the first counts.
            plain.setdefault("Local, without exits", {}).setdefault(seed, float(row["local_mean"]))
    # Means can be compared over the same seeds alone: those of the method with most.
    seeds = max((tuple(sorted(scores)) for scores in plain.values()), key=len, default=())
    full = {label: fmean(scores[s] for s in seeds) for label, scores in plain.items() if set(seeds) <= set(scores)}
    best = max(full, key=lambda label: full[label], default=None)
    lines = [_line(method, of_seed, None if best is None else plain[best]) for method, of_seed in by_method.items()]
    lines.sort(key=lambda line: -fmean(line.accuracies))
    best_plain = None if best is None else (best, full[best])
    return ExitComparison(dataset, alpha, clients, rounds, best_plain, tuple(lines))


def _line(method: str, of_seed: Mapping[int, Row], plain: Mapping[int, float] | None) -> ExitLine:
    rows = [row for _, row in sorted(of_seed.items())]
    saved = None
    if plain is not None and (common := sorted(of_seed.keys() & plain.keys())):
        curve = _mean_points([of_seed[seed] for seed in common], "budget").values()
        saved = 1.0 - cost_of(fmean(plain[seed] for seed in common), list(curve))
    return ExitLine(
        method,
        tuple(sorted(of_seed)),
        tuple(float(row["mean"]) for row in rows),
        tuple(_mean_points(rows, "exit").values()),
        _mean_points(rows, "budget"),
        saved,
    )


def _mean_points(rows: Sequence[Row], kind: str) -> dict[int, Point]:
    """Mean cost and accuracy by number of exit, or by budget in percent, of those that all rows have."""
    numbers = sorted(
        int(match[2])
        for name in rows[0]
        if (match := EXIT_COLUMN.fullmatch(name)) and match[1] == kind and not match[3]
        if all(row.get(name) for row in rows)
    )
    return {
        number: Point(
            fmean(float(row[f"{kind}_{number}_flops"]) for row in rows),
            fmean(float(row[f"{kind}_{number}"]) for row in rows),
        )
        for number in numbers
    }


def exit_curves(comparison: ExitComparison) -> Figure:
    """Accuracy against cost, one curve a method; the best method without exits is a line across."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 5.4), layout="constrained")
    axes = figure.subplots()
    for place, line in enumerate(comparison.lines):
        points = list(line.budgets.values())
        style = ("-", "--", ":")[place // len(CLIENT_COLOURS) % 3]
        colour = CLIENT_COLOURS[place % len(CLIENT_COLOURS)]
        axes.plot([p.cost for p in points], [p.accuracy for p in points], style, color=colour, label=line.method)
    if comparison.plain is not None:
        label, accuracy = comparison.plain
        axes.axhline(accuracy, color=BLACK, linewidth=0.9, linestyle="--")
        axes.annotate(label, (0.0, accuracy), xytext=(2, 3), textcoords="offset points", fontsize=8)
    axes.set_xlabel("mean FLOPs of an image, share of the plain network's")
    axes.set_ylabel("mean accuracy of the clients")
    axes.set_xlim(0.0, 1.02)
    axes.set_title(comparison.name, fontsize=10)
    axes.grid(color="#E5E5E5", linewidth=0.8)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    return figure


def exit_lines_table(comparison: ExitComparison) -> list[list[str]]:
    """The heads and the lines of a table, as text."""
    numbers = max(len(line.exits) for line in comparison.lines)
    first = next(line for line in comparison.lines if len(line.exits) == numbers)
    exits = [f"exit {n} ({point.cost:.0%} of the FLOPs)" for n, point in enumerate(first.exits, start=1)]
    budgets = [f"aimed at {budget}%" for budget in SHOWN]
    table = [["method", "accuracy", *exits, *budgets, "FLOPs saved", "seeds"]]
    for line in comparison.lines:
        at_exits = [f"{point.accuracy:.4f}" for point in line.exits] + [""] * (numbers - len(line.exits))
        aimed = [_told(line.budgets[budget]) if budget in line.budgets else "" for budget in SHOWN]
        mean = spread(line.accuracies, signed=False)
        table.append([line.method, mean, *at_exits, *aimed, _told_saving(line.saved), str(len(line.seeds))])
    return table


def _told(point: Point) -> str:
    return f"{point.accuracy:.4f} ({point.cost:.0%})"


def _told_saving(saved: float | None) -> str:
    if saved is None:
        return ""
    return "not reached" if math.isnan(saved) else minus(f"{saved:.1%}")

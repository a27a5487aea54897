"""What the calibrated exits of finished federations come to: what they save, whose promise holds, and what helps."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean

from fedekd.benchmark.measured import Measured, title
from fedekd.benchmark.results import COVERAGE, Row
from fedekd.early_exit.calibration.calibrator import MODES
from fedekd.early_exit.guarantee_coverage import CoverageResult
from fedekd.functional.binomial import clopper_pearson
from fedekd.reporting.pages import minus


@dataclass(frozen=True)
class PromiseLine:
    """One method under one rule at one error rate.

    Attributes:
        method: Its label.
        by_seed: What came of it, by seed.
    """

    method: str
    by_seed: Mapping[int, CoverageResult]

    @property
    def promise(self) -> CoverageResult:
        """Of the first seed: rule and error rate are the same in all."""
        return next(iter(self.by_seed.values()))

    def mean(self, of_client: str) -> float:
        """A number of `ClientExitReport`, mean over clients and seeds."""
        return fmean(self.of_seed(of_client, seed) for seed in self.by_seed)

    def of_seed(self, of_client: str, seed: int) -> float:
        """The same of one seed."""
        return fmean(float(getattr(client.report, of_client)) for client in self.by_seed[seed].clients)

    @property
    def counts(self) -> tuple[int, int]:
        """Of all clients and draws: in how many a client's own policy breaks its promise, and how many there are."""
        broken = sum(client.violations for promise in self.by_seed.values() for client in promise.clients)
        return broken, sum(promise.draws * len(promise.clients) for promise in self.by_seed.values())

    @property
    def worst_pooled(self) -> float:
        """The share of draws in which the shared policy breaks it for the client that it serves worst."""
        results = self.by_seed.values()
        return max(client.pooled_violations / result.draws for result in results for client in result.clients)


@dataclass(frozen=True)
class PromiseTable:
    """The methods at one place.

    Attributes:
        dataset: The data set.
        alpha: Concentration of its partition.
        lines: By error rate, rule and method.
    """

    dataset: str
    alpha: float
    lines: tuple[PromiseLine, ...]

    @property
    def name(self) -> str:
        """Its data set and alpha, to be read."""
        return f"{title(self.dataset)}, alpha {self.alpha:g}"


def promise_tables(measured: Measured) -> list[PromiseTable]:
    """A table for every data set and alpha at which the clients of finished federations were calibrated."""
    places: dict[tuple[str, float], list[Row]] = {}
    for row in measured.rows:
        if row.get(COVERAGE):
            places.setdefault((row["dataset"], float(row["alpha"])), []).append(row)
    return [_table(*place, rows) for place, rows in sorted(places.items())]


def _table(dataset: str, alpha: float, rows: Sequence[Row]) -> PromiseTable:
    found: dict[tuple[float, int, str], dict[int, CoverageResult]] = {}
    for row in sorted(rows, key=lambda row: int(row["seed"])):
        for values in json.loads(row[COVERAGE]):
            promise = CoverageResult.from_values(values)
            place = promise.target_risk, list(MODES).index(promise.mode), row["method"]
            found.setdefault(place, {})[int(row["seed"])] = promise
    return PromiseTable(dataset, alpha, tuple(PromiseLine(key[2], by_seed) for key, by_seed in sorted(found.items())))


def saving_lines(table: PromiseTable) -> list[list[str]]:
    """What leaving early saves on the clients' test splits, as text: heads and lines."""
    found = [["method", "error rate", "rule", "exits open", "leave early", "FLOPs saved", "accuracy (change)", "seeds"]]
    for line in table.lines:
        change = line.mean("accuracy") - line.mean("full_accuracy")
        exits = line.mean("exits") - 1
        found.append(
            [
                *_place(line),
                f"{line.mean('open_exits'):.2f} of {exits:g}",
                f"{line.mean('early_share'):.1%}",
                minus(f"{line.mean('saved'):.1%}"),
                minus(f"{line.mean('accuracy'):.4f} ({change:+.4f})"),
                str(len(line.by_seed)),
            ]
        )
    return found


def keeping_lines(table: PromiseTable) -> list[list[str]]:
    """How often promises are broken, as text: heads and lines."""
    heads = ["method", "error rate", "rule", "own policy", "pooled policy", "its worst client", "all together", "draws"]
    found = [heads]
    for line in table.lines:
        broken, of = line.counts
        low, high = clopper_pearson(broken, of)
        promises = line.by_seed.values()
        found.append(
            [
                *_place(line),
                f"{broken / of:.3f} ({low:.3f} to {high:.3f})",
                f"{fmean(promise.pooled_violation_rate for promise in promises):.3f}",
                f"{line.worst_pooled:.3f}",
                f"{fmean(promise.union_violations / promise.draws for promise in promises):.3f}",
                f"{of:,}",
            ]
        )
    return found


def _place(line: PromiseLine) -> list[str]:
    return [line.method, f"{line.promise.target_risk:g}", line.promise.mode]


def promise_finding(table: PromiseTable) -> list[str]:
    """What each factor does to the exits: sentences.

    Labels of methods are read as lists: two that differ in one part are a pair, seed by seed.
    """
    return [*_factors(table), *_calibration(table)]


def _factors(table: PromiseTable) -> Iterator[str]:
    for (alpha, mode), lines in _by_rule(table).items():
        if not MODES[mode].has_guarantee:
            continue
        told = [sentence for changed in _pairs(lines).items() if (sentence := _told_pair(*changed))]
        if told:
            yield f"At an error rate of {alpha:g} by {mode}: {'; '.join(told)}."


def _by_rule(table: PromiseTable) -> dict[tuple[float, str], list[PromiseLine]]:
    found: dict[tuple[float, str], list[PromiseLine]] = {}
    for line in table.lines:
        found.setdefault((line.promise.target_risk, line.promise.mode), []).append(line)
    return found


Pairs = list[tuple[PromiseLine, PromiseLine]]


def _pairs(lines: Sequence[PromiseLine]) -> dict[tuple[str, str], Pairs]:
    """Methods that differ in one part of their labels, by that part; `no gate` stands second, as does what is later."""
    found: dict[tuple[str, str], Pairs] = {}
    for one, other in combinations(lines, 2):
        parts = [label.split(", ") for label in (one.method, other.method)]
        if len(parts[0]) != len(parts[1]):
            continue
        changed = [pair for pair in zip(*parts, strict=True) if pair[0] != pair[1]]
        if len(changed) != 1:
            continue
        first, second = changed[0]
        if (second, first) in found or first == f"no {second}":
            first, second, one, other = second, first, other, one
        found.setdefault((first, second), []).append((one, other))
    return found


def _told_pair(changed: tuple[str, str], pairs: Pairs) -> str:
    """As in `gate against no gate (4 pairs of runs), accuracy +0.0012, exits open +0.08, FLOPs saved +0.4 points`."""
    common = [(one, other, seed) for one, other in pairs for seed in one.by_seed if seed in other.by_seed]
    if not common:
        return ""

    def gain(of_client: str) -> list[float]:
        return [one.of_seed(of_client, seed) - other.of_seed(of_client, seed) for one, other, seed in common]

    runs = f"{len(common)} pair{'s' if len(common) > 1 else ''} of runs"
    better = sum(each > 0 for each in gain("saved"))
    return minus(
        f"{changed[0]} against {changed[1]} ({runs}), accuracy of the last exit {fmean(gain('full_accuracy')):+.4f},"
        f" exits open {fmean(gain('open_exits')):+.2f}, FLOPs saved {100 * fmean(gain('saved')):+.1f} points (more in"
        f" {better} of {len(common)})"
    )


def _calibration(table: PromiseTable) -> Iterator[str]:
    by_rule = _by_rule(table)
    for alpha in dict.fromkeys(alpha for alpha, _ in by_rule):
        told = []
        for mode in (mode for rate, mode in by_rule if rate == alpha):
            lines = by_rule[alpha, mode]
            broken, of = (sum(each) for each in zip(*(line.counts for line in lines), strict=True))
            saved = fmean(line.mean("saved") for line in lines)
            told.append(
                minus(f"{mode} saves {saved:.1%}") + f" of the FLOPs and breaks {broken / of:.1%} of its promises"
            )
        if len(told) > 1:
            yield f"At an error rate of {alpha:g}, over all methods, {', '.join(told)}."

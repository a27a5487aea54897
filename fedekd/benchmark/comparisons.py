"""Methods held against each other over seeds: in pairs, and in a ranking."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from fedekd.benchmark.measured import Measured
from fedekd.benchmark.statistics import MIN_PAIRS, PairedTest, Ranking, holm, paired, rank
from fedekd.benchmark.tables import SWEEPS

#: The measures that methods are compared in: harm on average, and at worst.
COMPARED = {"delta_avg": "average Delta", "delta_worst": "worst Delta"}


@dataclass(frozen=True)
class Comparison:
    """One method minus another at one place.

    Attributes:
        dataset: The data set.
        alpha: Concentration of its partition.
        measure: Column of the results.
        first: A method.
        second: The method that it is held against.
        gain: +1 if a positive difference favours the first, -1 if a negative one does.
        test: The paired test.
        adjusted: Its p-value adjusted by Holm for its family; None where there is none.
    """

    dataset: str
    alpha: float
    measure: str
    first: str
    second: str
    gain: int
    test: PairedTest
    adjusted: float | None = None


def compare(measured: Measured, dataset: str, alpha: float, measure: str, first: str, second: str) -> Comparison | None:
    """A comparison of two methods, or None if no seed has both."""
    ours, theirs = (measured.values(measure, method, dataset, alpha) for method in (first, second))
    test = paired(ours, theirs)
    gain = 1 if measured.metric(dataset) == "accuracy" else -1
    return Comparison(dataset, alpha, measure, first, second, gain, test) if test.pairs else None


def adjust(family: list[Comparison]) -> list[Comparison]:
    """The comparisons with their p-values adjusted as one family."""
    tested = [comparison for comparison in family if comparison.test.p is not None]
    values = iter(holm([comparison.test.p for comparison in tested if comparison.test.p is not None]))
    return [
        comparison if comparison.test.p is None else replace(comparison, adjusted=next(values)) for comparison in family
    ]


def against(measured: Measured, method: str = "FedeKD") -> list[Comparison]:
    """A method against every other; a family is one data set, alpha and measure."""
    found: list[Comparison] = []
    for dataset, alpha, measure in _places(measured):
        others = [name for name in _unswept(measured, dataset) if name not in (method, "Local")]
        family = [compare(measured, dataset, alpha, measure, method, other) for other in others]
        found += adjust([comparison for comparison in family if comparison is not None])
    return found


def rankings(measured: Measured) -> list[tuple[str, str, Ranking]]:
    """For each data set and measure the ranking of the methods over (alpha, seed), Local among them.

    The repetitions are those that all ranked methods have; a method with too few is left out.
    """
    found = []
    for dataset in measured.datasets:
        for measure in COMPARED:
            scores = {name: _by_place(measured, dataset, measure, name) for name in _unswept(measured, dataset)}
            scores.pop("Local", None)
            common = _common(scores)
            if len(common) >= MIN_PAIRS and len(scores) >= 2:
                table = {name: [values[place] for place in common] for name, values in scores.items()}
                # Doing without the others: its Delta is zero by definition.
                table["Local"] = [0.0] * len(common)
                found.append((dataset, measure, rank(table, measured.metric(dataset) == "accuracy")))
    return found


def _common(scores: dict[str, dict[tuple[float, int], float]]) -> list[tuple[float, int]]:
    """The places that all have; those with the fewest are dropped from `scores` until there are enough."""
    while scores:
        shared = set.intersection(*(set(values) for values in scores.values()))
        if len(shared) >= MIN_PAIRS:
            return sorted(shared)
        scores.pop(min(scores, key=lambda name: len(scores[name])))
    return []


def _by_place(measured: Measured, dataset: str, measure: str, method: str) -> dict[tuple[float, int], float]:
    return {
        (alpha, seed): value
        for alpha in measured.alphas(dataset)
        for seed, value in measured.values(measure, method, dataset, alpha).items()
    }


def _places(measured: Measured) -> Iterator[tuple[str, float, str]]:
    for dataset in measured.datasets:
        for alpha in measured.alphas(dataset):
            for measure in COMPARED:
                yield dataset, alpha, measure


def _unswept(measured: Measured, dataset: str) -> list[str]:
    return [name for name in measured.methods(dataset) if not name.startswith(SWEEPS)]


def by_place(comparisons: list[Comparison]) -> Mapping[tuple[str, float], list[Comparison]]:
    """Comparisons grouped by data set and alpha."""
    groups: dict[tuple[str, float], list[Comparison]] = {}
    for comparison in comparisons:
        groups.setdefault((comparison.dataset, comparison.alpha), []).append(comparison)
    return groups

"""Methods held against each other over seeds: in pairs, and in a ranking."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from fedekd.benchmark.measured import Measured
from fedekd.benchmark.statistics import MIN_PAIRS, PairedTest, Ranking, holm, paired, rank

#: The measures that methods are compared in: harm on average, and at worst.
COMPARED = {"delta_avg": "average Delta", "delta_worst": "worst Delta"}

#: FedeKD, and the two controls of its gate: its weights dealt at random, and full trust.
GATED, SHUFFLED, UNGATED = "FedeKD", "Shuffled gate", "No gating"


@dataclass(frozen=True)
class Comparison:
    """One method minus another at one place.

    Attributes:
        dataset: The data set.
        alpha: Concentration of its partition.
        measure: Column of the results.
        first: A method.
        second: The method that it is held against.
        sign: +1 if a positive difference favours the first, -1 if a negative one does.
        test: The paired test.
        adjusted: Its p-value adjusted by Holm for its family; None where there is none.
    """

    dataset: str
    alpha: float
    measure: str
    first: str
    second: str
    sign: int
    test: PairedTest
    adjusted: float | None = None

    @property
    def gain(self) -> float:
        """What the first gains on the second: positive where it is better, whatever the score."""
        return self.sign * self.test.difference

    @property
    def favours(self) -> str:
        """The method with the better mean."""
        return self.first if self.gain > 0 else self.second if self.gain < 0 else "neither"


def compare(measured: Measured, first: str, second: str, dataset: str, alpha: float, measure: str) -> Comparison:
    """A comparison of two methods, over the seeds that both have."""
    ours, theirs = (measured.values(measure, method, dataset, alpha) for method in (first, second))
    sign = 1 if measured.metric(dataset) == "accuracy" else -1
    return Comparison(dataset, alpha, measure, first, second, sign, paired(ours, theirs))


def family(comparisons: Iterable[Comparison]) -> list[Comparison]:
    """Those comparisons that have a pair, with their p-values adjusted together."""
    found = [comparison for comparison in comparisons if comparison.test.pairs]
    adjusted = iter(holm([c.test.p for c in found if c.test.p is not None]))
    return [c if c.test.p is None else replace(c, adjusted=next(adjusted)) for c in found]


def against(measured: Measured, method: str = GATED) -> list[Comparison]:
    """A method against every other but the controls of its gate; a family is one data set, alpha and measure."""
    found: list[Comparison] = []
    for dataset in measured.datasets:
        others = [name for name in measured.methods(dataset) if name not in (method, "Local", SHUFFLED, UNGATED)]
        for alpha in measured.alphas(dataset):
            for measure in COMPARED:
                found += family(compare(measured, method, other, dataset, alpha, measure) for other in others)
    return found


@dataclass(frozen=True)
class Standing:
    """How methods rank on a data set.

    Attributes:
        dataset: The data set.
        measure: What they are ranked by.
        ranking: The ranking, Local among the ranked.
        alphas: Over which alphas.
        omitted: Methods that share too few runs with the others.
    """

    dataset: str
    measure: str
    ranking: Ranking
    alphas: Sequence[float]
    omitted: Sequence[str]


def standings(measured: Measured) -> list[Standing]:
    """For each data set and measure the ranking of the methods over (alpha, seed)."""
    found = []
    for dataset in measured.datasets:
        for measure in COMPARED:
            scores = {
                name: _scores(measured, dataset, measure, name) for name in measured.methods(dataset) if name != "Local"
            }
            ranked, common = _with_common(scores)
            if len(ranked) >= 2:
                table = {name: [scores[name][place] for place in common] for name in ranked}
                # To do without the others: its Delta is zero by definition.
                table["Local"] = [0.0] * len(common)
                ranking = rank(table, measured.metric(dataset) == "accuracy")
                alphas = sorted({alpha for alpha, _ in common})
                found.append(Standing(dataset, measure, ranking, alphas, [m for m in scores if m not in ranked]))
    return found


_Scores = dict[tuple[float, int], float]


def _scores(measured: Measured, dataset: str, measure: str, method: str) -> _Scores:
    """A method's scores by alpha and seed, without runs that diverged."""
    return {
        (alpha, seed): value
        for alpha in measured.alphas(dataset)
        for seed, value in measured.values(measure, method, dataset, alpha).items()
        if not math.isnan(value)
    }


def _with_common(scores: dict[str, _Scores]) -> tuple[list[str], list[tuple[float, int]]]:
    """As many methods as share enough places, and those places; the method with the most places begins."""
    chosen: list[str] = []
    common: set[tuple[float, int]] = set()
    waiting = sorted(scores, key=lambda name: -len(scores[name]))
    while waiting:
        name = max(waiting, key=lambda name: len(common & scores[name].keys()) if chosen else len(scores[name]))
        waiting.remove(name)
        shared = common & scores[name].keys() if chosen else set(scores[name])
        if len(shared) < MIN_PAIRS:
            break
        chosen.append(name)
        common = shared
    return [name for name in scores if name in chosen], sorted(common)

"""The paper's central claim, that it matters which images the gate trusts the proxy on, told from the results."""

from __future__ import annotations

from dataclasses import dataclass

from fedekd.benchmark.comparisons import COMPARED, GATED, SHUFFLED, UNGATED, Comparison, compare, family
from fedekd.benchmark.measured import Measured, title
from fedekd.benchmark.statistics import LEVEL, MIN_PAIRS

#: The gate's effect in two steps: less trust for all images alike, then the right images.
_STEPS = ((SHUFFLED, UNGATED), (GATED, SHUFFLED))


def gate_comparisons(measured: Measured) -> list[Comparison]:
    """Shuffled against none, gate against shuffled, and gate against none, wherever they were run.

    Each of the three questions is, for each measure, one family of tests over all data sets and alphas.
    """
    return [
        comparison
        for first, second in (*_STEPS, (GATED, UNGATED))
        for measure in COMPARED
        for comparison in family(
            compare(measured, first, second, dataset, alpha, measure)
            for dataset in measured.datasets
            for alpha in measured.alphas(dataset)
        )
    ]


@dataclass(frozen=True)
class GateFinding:
    """What the results say of the gate's ranking.

    Attributes:
        summary: The finding.
        places: A sentence for each data set and alpha, with the figures.
    """

    summary: str
    places: tuple[str, ...] = ()

    @property
    def paragraph(self) -> str:
        """All of it."""
        return " ".join((self.summary, *self.places))


def gate_finding(comparisons: list[Comparison]) -> GateFinding:
    """Whether the gate's ranking matters, in words and figures.

    Args:
        comparisons: As `gate_comparisons` gives them.
    """
    tested = [c for c in comparisons if c.test.p is not None]
    ranking = [c for c in tested if (c.first, c.second) == (GATED, SHUFFLED)]
    if not ranking:
        return GateFinding(
            f"Nothing can be said: it takes {MIN_PAIRS} seeds of FedeKD with its gate and with the gate's weights "
            "shuffled."
        )
    summary = (
        "Against full trust (none) the gate does two things: it trusts all images less, and it trusts some more than "
        "others. Its own weights dealt at random within each batch (shuffled) do the first without the second, so what "
        "the ranking is worth is what the gate gains on them. "
        + " ".join(_answer([c for c in ranking if c.measure == measure], told) for measure, told in COMPARED.items())
        + " A gain is positive where the method is better; p is that of Wilcoxon's signed-rank test over seeds, with a"
        f" * where it stays within {LEVEL} after Holm's adjustment over all places."
    )
    places = dict.fromkeys((c.dataset, c.alpha) for c in comparisons)
    sentences = [told for place in places if (told := _place(tested, *place))]
    few = [f"{title(d)} at alpha {a:g}" for d, a in places if not any((c.dataset, c.alpha) == (d, a) for c in tested)]
    if few:
        sentences.append(f"Too few seeds for a test: {', '.join(few)}.")
    return GateFinding(summary, tuple(sentences))


def _answer(ranking: list[Comparison], measure: str) -> str:
    """What the ranking is worth in one measure."""
    clear = [c for c in ranking if _is_clear(c)]
    places = f"{len(ranking)} place{'s' if len(ranking) > 1 else ''}"
    if clear:
        helps = [c for c in clear if c.gain > 0]
        better = "all for the better" if len(helps) == len(clear) else f"{len(helps)} of them for the better"
        where = ", ".join(dict.fromkeys(title(c.dataset) for c in clear))
        return f"For the {measure} it makes a clear difference in {len(clear)} of {places}, {better} ({where})."
    # The smallest p that so many seeds can give is 2 / 2^n; Holm multiplies it by the number of tests.
    if min(2.0 ** (1 - c.test.pairs) for c in ranking) * len(ranking) > LEVEL:
        return f"For the {measure} the seeds are too few to show anything in {places}."
    return f"For the {measure} no difference is clear in any of {places}."


def _is_clear(comparison: Comparison) -> bool:
    return comparison.adjusted is not None and comparison.adjusted <= LEVEL


def _place(tested: list[Comparison], dataset: str, alpha: float) -> str:
    """As in `RetinaMNIST at alpha 0.1, 10 seeds: worst Delta, shuffled gains +0.0232 on none (p = 0.02), ...`."""
    here = [c for c in tested if (c.dataset, c.alpha) == (dataset, alpha)]
    told = []
    for measure, name in COMPARED.items():
        steps = [
            f"{_NAMES[c.first]} gains {c.gain:+.4f} on {_NAMES[c.second]} (p = {c.test.p:.2g}{'*' * _is_clear(c)})"
            for first, second in _STEPS
            for c in here
            if (c.first, c.second, c.measure) == (first, second, measure)
        ]
        if steps:
            told.append(f"{name}, {' and '.join(steps)}")
    seeds = max((c.test.pairs for c in here), default=0)
    return f"{title(dataset)} at alpha {alpha:g}, {seeds} seeds: {'; '.join(told)}." if told else ""


_NAMES = {GATED: "the gate", SHUFFLED: "shuffled", UNGATED: "none"}

"""The paper's central claim, that it matters whom the gate trusts, told in one paragraph from the results."""

from __future__ import annotations

from dataclasses import dataclass

from fedekd.benchmark.comparisons import COMPARED, Comparison, adjust, by_place, compare
from fedekd.benchmark.measured import Measured
from fedekd.benchmark.published import DATASETS
from fedekd.benchmark.statistics import LEVEL, MIN_PAIRS

GATED, SHUFFLED, UNGATED = "FedeKD", "Shuffled gate", "No gating"


def gate_comparisons(measured: Measured) -> list[Comparison]:
    """Gate against shuffled, gate against none and shuffled against none, wherever two of them were run.

    Each of the three questions is one family of tests over all data sets, alphas and measures.
    """
    found: list[Comparison] = []
    for first, second in ((GATED, SHUFFLED), (GATED, UNGATED), (SHUFFLED, UNGATED)):
        family = [
            compare(measured, dataset, alpha, measure, first, second)
            for dataset in measured.datasets
            for alpha in measured.alphas(dataset)
            for measure in COMPARED
        ]
        found += adjust([comparison for comparison in family if comparison is not None])
    return found


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


def gate_finding(measured: Measured) -> GateFinding:
    """Whether the gate's ranking matters, in words and figures."""
    comparisons = gate_comparisons(measured)
    ranking = [c for c in comparisons if c.second == SHUFFLED and c.test.p is not None]
    if not ranking:
        return GateFinding(
            f"Nothing can be said: it takes {MIN_PAIRS} seeds of FedeKD with its gate and with the gate's weights "
            "shuffled."
        )
    summary = (
        "The gate is held, seed by seed, against its own weights dealt at random within each batch (shuffled: as much "
        f"trust, but blind) and against full trust (none). {_answer(ranking)} A gain is positive where the gate is "
        f"better; p is that of Wilcoxon's signed-rank test, with a * where it stays below {LEVEL} after Holm's "
        "adjustment over all places."
    )
    sentences, few = [], []
    for (dataset, alpha), group in by_place(comparisons).items():
        place = f"{DATASETS.get(dataset, dataset)} at alpha {alpha:g}"
        told = [_gains(group, GATED, SHUFFLED, "on shuffled weights"), _gains(group, GATED, UNGATED, "on none")]
        if any(told):
            seeds = max(c.test.pairs for c in group)
            sentences.append(f"{place}, {seeds} seeds: the gate gains {'; '.join(filter(None, told))}.")
        else:
            few.append(place)
    if few:
        sentences.append(f"Too few seeds for a test: {', '.join(few)}.")
    return GateFinding(summary, tuple(sentences))


def _answer(ranking: list[Comparison]) -> str:
    clear = [c for c in ranking if c.adjusted is not None and c.adjusted <= LEVEL]
    helps = [c for c in clear if c.gain * c.test.difference > 0]
    count = f"{len(ranking)} comparisons with shuffled weights"
    if not clear:
        found = f"Whom it trusts makes no clear difference in any of {count}"
    else:
        better = "all" if len(helps) == len(clear) else f"{len(helps)}"
        found = f"Whom it trusts makes a clear difference in {len(clear)} of {count}, {better} of them for the better"
    if len(clear) < len(ranking):
        found += (
            "; where it makes none, what the gate does is to halve the distillation, since its mean weight is about 1/2"
        )
    return f"{found}."


def _gains(group: list[Comparison], first: str, second: str, on_what: str) -> str:
    """As in `+0.0001 on average (p = 0.77) and -0.0010 at worst (p = 1) on shuffled weights`."""
    told = [
        f"{c.gain * c.test.difference:+.4f} {'on average' if c.measure == 'delta_avg' else 'at worst'} "
        f"(p = {c.test.p:.2g}{'*' if c.adjusted is not None and c.adjusted <= LEVEL else ''})"
        for c in group
        if (c.first, c.second) == (first, second) and c.test.p is not None
    ]
    return f"{' and '.join(told)} {on_what}" if told else ""

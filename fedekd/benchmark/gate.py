"""The paper's central claim, that it matters whom the gate trusts, told in one paragraph from the results."""

from __future__ import annotations

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


def gate_paragraph(measured: Measured) -> str:
    """Whether the gate's ranking matters, in words and figures."""
    comparisons = gate_comparisons(measured)
    ranking = [c for c in comparisons if (c.first, c.second) == (GATED, SHUFFLED) and c.test.p is not None]
    if not ranking:
        return (
            f"Nothing can be said: it takes {MIN_PAIRS} seeds of FedeKD with its gate and with the gate's "
            "weights shuffled."
        )
    clear = [c for c in ranking if c.adjusted is not None and c.adjusted <= LEVEL]
    helps = [c for c in clear if c.gain * c.test.difference > 0]
    held = (
        "The gate is held, seed by seed, against its own weights dealt at random within each batch (shuffled: as much "
        "trust, but blind) and against full trust (none). "
    )
    count = f"{len(ranking)} comparisons with shuffled weights"
    if clear:
        better = "all" if len(helps) == len(clear) else str(len(helps))
        found = f"Whom it trusts makes a clear difference in {len(clear)} of {count}, {better} of them for the better"
    else:
        found = f"Whom it trusts makes no clear difference in any of {count}"
    sentences = [f"{held}{found} (Wilcoxon's signed-rank test at {LEVEL:.0%}, adjusted by Holm; marked *)."]
    few = []
    for (dataset, alpha), group in by_place(comparisons).items():
        place = f"{DATASETS.get(dataset, dataset)} at alpha {alpha:g}"
        if any(c.test.p is not None for c in group):
            told = [_told(group, *pair) for pair in ((GATED, SHUFFLED), (GATED, UNGATED))]
            seeds = max(c.test.pairs for c in group)
            sentences.append(f"{place}, {seeds} seeds: the gate {'; '.join(filter(None, told))}.")
        else:
            few.append(place)
    if few:
        sentences.append(f"Too few seeds for a test: {', '.join(few)}.")
    return " ".join(sentences)


def _told(group: list[Comparison], first: str, second: str) -> str:
    """As in `gains +0.0001 on average and +0.0007 at worst on shuffled (p = 0.77, 0.49)`."""
    chosen = [c for c in group if (c.first, c.second) == (first, second) and c.test.p is not None]
    if not chosen:
        return ""
    gains = " and ".join(
        f"{c.gain * c.test.difference:+.4f} {'on average' if c.measure == 'delta_avg' else 'at worst'}" for c in chosen
    )
    values = ", ".join(f"{c.test.p:.2g}{'*' if (c.adjusted or 1) <= LEVEL else ''}" for c in chosen)
    return f"gains {gains} on {'shuffled weights' if second == SHUFFLED else 'none'} (p = {values})"

"""Streams of arrivals, and the alarms of the monitor and of fixed windows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import mannwhitneyu

from experiments.monitoring.scores import CLEAN, Scores
from fedekd.functional import betting_e_process, conformal_ranks, error_payoffs, loss_payoffs, rank_e_process
from fedekd.functional.binomial import error_p_value
from fedekd.seeding import derive_seed

Array = npt.NDArray[Any]

#: Row of a stream without an alarm.
NEVER = np.inf


@dataclass(frozen=True)
class Design:
    """Choices that are fixed before results are seen.

    Attributes:
        streams: Number of streams of a scenario.
        arrivals: Length of a stream.
        change: Arrivals before the change.
        reference: Samples of the reference of drift tests, drawn together with the arrivals.
        target_risk: Target risk of exits.
        margin: Margin of do no harm.
        level: Largest probability of a false alarm of all quantities of a family together.
        windows: Lengths of the fixed windows.
    """

    streams: int = 1000
    arrivals: int = 3000
    change: int = 1000
    reference: int = 500
    target_risk: float = 0.05
    margin: float = 0.02
    level: float = 0.1
    windows: tuple[int, ...] = (100, 250, 500)


@dataclass(frozen=True, eq=False)
class Streams:
    """Values of all streams: reference (R, S), and arrivals (T, S) by name."""

    reference: dict[str, Array]
    values: dict[str, Array]


def draw(design: Design, scores: dict[str, Scores], pool: str) -> Streams:
    """Draw streams from the clean pool; after the change samples are corrupted.

    With replacement: given the pool, arrivals and reference are independent draws, and so are the streams.

    Args:
        design: Sizes.
        scores: Scores by pool.
        pool: Pool after the change; `none` for streams without a change.
    """
    clean, changed = scores[CLEAN], scores[pool]
    size, length = len(clean["errors"]), design.reference + design.arrivals
    rng = np.random.default_rng(derive_seed(0, "streams", design.streams, design.arrivals, pool))
    order = rng.integers(0, size, (length, design.streams))
    first, rest = order[: design.reference], order[design.reference :]
    before, after = rest[: design.change], rest[design.change :]
    names = [name for name in clean if name != "thresholds"]
    return Streams(
        {name: clean[name][first] for name in ("confidence", "disagreement")},
        {name: np.concatenate([clean[name][before], changed[name][after]]) for name in names},
    )


def at_target(design: Design) -> Streams:
    """Return streams in which exit 1 takes all samples, with the target error rate."""
    rng = np.random.default_rng(derive_seed(0, "at target", design.streams))
    errors = (rng.random((design.arrivals, design.streams)) < design.target_risk).astype(float)
    return Streams({}, {"errors": errors, "exits": np.ones_like(errors), "excess": np.zeros_like(errors)})


def first_rows(evidence: Array, threshold: float) -> Array:
    """Return the row of each stream's first alarm, shape (S,); inf without one."""
    reached = evidence >= threshold
    return np.where(reached.any(axis=0), reached.argmax(axis=0), NEVER)


def monitor_alarms(design: Design, streams: Streams, quantity: str, quantities: int) -> Array:
    """Return the row of the monitor's first alarm in each stream, shape (S,)."""
    threshold = quantities / design.level
    if quantity in streams.reference:
        reference, values = streams.reference[quantity], streams.values[quantity]
        # Drawn per stream: shared uniforms would make the false alarms of streams dependent.
        uniforms = np.random.default_rng(derive_seed(0, quantity, "ties")).random(values.shape)
        columns = zip(reference.T, values.T, uniforms.T, strict=True)
        ranks = np.stack([conformal_ranks(*column) for column in columns], axis=1)
        return first_rows(rank_e_process(ranks), threshold)
    if quantity == "do_no_harm":
        return first_rows(betting_e_process(loss_payoffs(streams.values["excess"], design.margin)), threshold)
    # The bets count only the samples of the exit: these first, in order, and then payoffs of 0.
    takes = streams.values["exits"] == _number(quantity)
    order = np.argsort(~takes, axis=0, kind="stable")
    errors = np.take_along_axis(streams.values["errors"], order, axis=0)
    is_taken = np.take_along_axis(takes, order, axis=0)
    payoffs = np.where(is_taken, error_payoffs(errors, design.target_risk), 0.0)
    evidence = np.where(is_taken, betting_e_process(payoffs), 0.0)
    rows = first_rows(evidence, threshold)
    found = np.isfinite(rows)
    rows[found] = order[rows[found].astype(int), np.flatnonzero(found)]
    return rows


def mapie_alarms(design: Design, streams: Streams, quantity: str, quantities: int) -> Array:
    """Return the row of the first alarm of MAPIE's RiskMonitoring on an exit, (S,)."""
    from mapie.exchangeability_testing import RiskMonitoring  # of the extra `test`

    takes, errors = streams.values["exits"] == _number(quantity), streams.values["errors"]
    result = np.full(takes.shape[1], NEVER)
    for number in range(takes.shape[1]):
        rows = np.flatnonzero(takes[:, number])
        predicted = errors[rows, number].astype(int)
        # It keeps half of its level for a bound of the reference risk, which a given threshold replaces.
        level = 2 * design.level / quantities
        monitor = RiskMonitoring("accuracy", test_level=level, threshold=design.target_risk, warn=False)
        monitor.update(np.zeros_like(predicted), predicted)
        reached = monitor.online_risk_lower_bound_sequence_history > design.target_risk
        if reached.any():
            result[number] = rows[reached.argmax()]
    return result


def window_alarms(design: Design, streams: Streams, quantity: str, quantities: int, window: int) -> Array:
    """Return the last row of the first window that rejects, per stream, shape (S,).

    The level is divided by quantities and windows (Bonferroni), so that the bound of the family equals the monitor's.
    Exits: exact binomial test. Do no harm: a bet that starts with the window. Drift: two-sided Mann-Whitney test.
    """
    count = design.arrivals // window
    level = design.level / quantities / count
    test = _window_test(design, streams, quantity)
    p_values = np.stack([test(slice(index * window, (index + 1) * window)) for index in range(count)])
    rows = first_rows(-p_values, -level)
    return (rows + 1) * window - 1


def _window_test(design: Design, streams: Streams, quantity: str) -> Callable[[slice], Array]:
    values = streams.values
    if quantity in streams.reference:
        reference = streams.reference[quantity]
        return lambda part: np.asarray(mannwhitneyu(values[quantity][part], reference, axis=0).pvalue)
    if quantity == "do_no_harm":
        payoffs = loss_payoffs(values["excess"], design.margin)
        return lambda part: 1.0 / np.maximum(1.0, 2 * betting_e_process(payoffs[part], design.arrivals)[-1] - 1)
    takes = values["exits"] == _number(quantity)

    def binomial(part: slice) -> Array:
        samples = takes[part].sum(axis=0)
        correct = samples - (takes[part] * values["errors"][part]).sum(axis=0)
        # As many errors or more: as many correct samples or fewer, at the rate 1 - target risk.
        return error_p_value(correct, samples, 1.0 - design.target_risk)

    return binomial


def _number(quantity: str) -> int:
    return int(quantity.removeprefix("exit "))

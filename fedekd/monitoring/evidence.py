"""Evidence against each hypothesis of a monitor after each arrival."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fedekd.functional import (
    betting_e_process,
    conformal_ranks,
    error_payoffs,
    first_alarm,
    loss_payoffs,
    rank_e_process,
)
from fedekd.monitoring.arrivals import Arrivals
from fedekd.monitoring.start import MonitorStart, Quantity
from fedekd.seeding import derive_seed

Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class Followed:
    """One quantity after some arrivals.

    Attributes:
        quantity: What is followed.
        rows: Rows of the arrivals that count, from 0, shape (m,).
        evidence: Value of the e-process after each of them, shape (m,).
        observed: Mean of the values: an error rate, a mean excess loss, or a mean rank; NaN without rows.
        alarm: Row of the first alarm, from 0; None without one.
    """

    quantity: Quantity
    rows: Array
    evidence: Array
    observed: float
    alarm: int | None

    @property
    def last(self) -> float:
        """Evidence after the last row."""
        return float(self.evidence[-1]) if len(self.evidence) else 1.0

    @property
    def largest(self) -> float:
        """Largest evidence so far."""
        return float(self.evidence.max()) if len(self.evidence) else 1.0


def follow(start: MonitorStart, arrivals: Arrivals) -> list[Followed]:
    """Compute the evidence of all quantities; the first rows decide the first values.

    Args:
        start: Settings of the monitor.
        arrivals: Checked arrivals.

    Returns:
        One entry per quantity, in order.
    """
    return [_follow(start, quantity, arrivals) for quantity in start.quantities]


def _follow(start: MonitorStart, quantity: Quantity, arrivals: Arrivals) -> Followed:
    rows = np.arange(arrivals.rows)
    if quantity.kind == "exit":
        rows = np.flatnonzero(arrivals.exits == quantity.exit)
    values = arrivals.values[quantity.name][rows]
    if quantity.kind == "drift":
        seed = derive_seed(start.seed, start.client, quantity.name, "monitor")
        reference = (start.reference or {})[quantity.name]
        # Of one generator, the first numbers do not depend on how many are drawn.
        values = conformal_ranks(reference, values, np.random.default_rng(seed).random(len(values)))
        evidence = rank_e_process(values)
    elif quantity.kind == "do_no_harm":
        evidence = betting_e_process(loss_payoffs(values, quantity.limit / start.clip))
    else:
        evidence = betting_e_process(error_payoffs(values, quantity.limit))
    index = first_alarm(evidence, start.level)
    observed = float(values.mean()) if len(values) else float("nan")
    if quantity.kind == "do_no_harm":
        observed *= start.clip
    return Followed(quantity, rows, evidence, observed, None if index is None else int(rows[index]))

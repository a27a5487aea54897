"""Evidence of a monitor: what a later arrival cannot change."""

from __future__ import annotations

import numpy as np
import pytest

from fedekd.errors import UserError
from fedekd.functional import betting_e_process, loss_payoffs
from fedekd.monitoring import Arrivals, MonitorStart, Quantity, follow

RNG = np.random.default_rng(0)
QUANTITIES = (
    Quantity("exit", "exit 2", 0.2, 2),
    Quantity("do_no_harm", "do_no_harm", 0.5),
    Quantity("coverage", "coverage", 0.1),
    Quantity("drift", "confidence"),
)
VALUES = {
    "exit 2": (RNG.random(150) < 0.4).astype(float),
    "do_no_harm": RNG.uniform(-1, 1, 150),
    "coverage": (RNG.random(150) < 0.05).astype(float),
    "confidence": RNG.integers(0, 9, 150).astype(float),
}
EXITS = RNG.integers(1, 4, 150)


def start(**values) -> MonitorStart:
    reference = {"confidence": tuple(RNG.integers(0, 9, 40).astype(float))}
    defaults = {"quantities": QUANTITIES, "confidence": 0.9, "clip": 4.0, "reference": reference}
    return MonitorStart("regression", 0, "", "a" * 64, True, **{**defaults, **values})


def arrivals(rows: int) -> Arrivals:
    return Arrivals(rows, 0, "", EXITS[:rows], {name: values[:rows] for name, values in VALUES.items()})


def test_follow_prefix_has_the_first_values_of_all_arrivals() -> None:
    settings = start()
    whole = follow(settings, arrivals(150))
    for rows in (0, 1, 33, 90):
        for part, complete in zip(follow(settings, arrivals(rows)), whole, strict=True):
            assert part.rows.tolist() == [row for row in complete.rows if row < rows]
            assert part.evidence.tobytes() == complete.evidence[: len(part.rows)].tobytes()
            assert part.alarm == (complete.alarm if complete.alarm is not None and complete.alarm < rows else None)


def test_follow_margin_and_mean_are_in_the_unit_of_the_loss() -> None:
    """The values are in units of the clip, as the margin is in the test."""
    followed = follow(start(), arrivals(150))[1]
    expected = betting_e_process(loss_payoffs(VALUES["do_no_harm"], 0.5 / 4.0))
    np.testing.assert_array_equal(followed.evidence, expected)
    assert followed.observed == pytest.approx(4 * VALUES["do_no_harm"].mean())


def test_start_level_is_divided_by_the_quantities() -> None:
    assert start().level == 0.1 / 4
    for values, message in (
        ({"quantities": ()}, "expected at least 1 quantity"),
        ({"confidence": 1.0}, "confidence: expected a number"),
        ({"quantities": (Quantity("x", "x"),)}, "expected a quantity of exit, do_no_harm"),  # type: ignore[arg-type]
    ):
        with pytest.raises(UserError, match=message):
            start(**values)

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom

from fedekd.early_exit.calibration.risk_curve import expected_p_value, risk_curve, samples_needed

samples = st.lists(st.tuples(st.sampled_from([0.1, 0.25, 0.5, 0.9]), st.booleans()), max_size=30)


def walk_of(pairs):
    return risk_curve(np.array([score for score, _ in pairs]), np.array([right for _, right in pairs], dtype=bool))


@given(samples)
def test_every_distinct_score_is_a_step_and_ties_leave_together(pairs):
    walk = walk_of(pairs)
    steps = sorted({score for score, _ in pairs}, reverse=True)
    assert walk.thresholds.tolist() == steps
    assert walk.samples.tolist() == [sum(score >= step for score, _ in pairs) for step in steps]
    assert walk.errors.tolist() == [sum(score >= step and not right for score, right in pairs) for step in steps]
    assert walk.risk.tolist() == [k / m for k, m in zip(walk.errors, walk.samples, strict=True)]


@given(samples, st.randoms())
def test_the_order_of_the_samples_does_not_matter(pairs, random):
    shuffled = list(pairs)
    random.shuffle(shuffled)
    for one, two in zip(walk_of(pairs), walk_of(shuffled), strict=True):
        assert one.tolist() == two.tolist()


def test_scores_one_bit_apart_are_two_steps():
    close = float(np.nextafter(0.5, 1))
    assert walk_of([(0.5, True), (close, False)]).thresholds.tolist() == [close, 0.5]


def test_a_forecast_scales_samples_and_errors():
    walk = walk_of([(0.9, True)] * 20 + [(0.5, False)] * 2 + [(0.5, True)] * 18)
    assert expected_p_value(walk, 0.1, 1.0) == pytest.approx([0.9**20, binom.cdf(2, 40, 0.1)], abs=1e-12)
    assert expected_p_value(walk, 0.1, 3.0) == pytest.approx([0.9**60, binom.cdf(6, 120, 0.1)], abs=1e-12)


@pytest.mark.parametrize(("errors", "right", "alpha"), [(0, 30, 0.05), (1, 99, 0.02), (3, 97, 0.05), (12, 88, 0.15)])
@pytest.mark.parametrize("of", [1, 4])
def test_so_many_samples_would_open_an_exit_and_fewer_would_not(errors, right, alpha, of):
    """`of` times as many samples enter the network as come to this exit."""
    seen = errors + right
    walk = walk_of([(0.9, place >= errors) for place in range(seen)])
    needed = samples_needed(walk, alpha, 0.1, of * seen)
    assert expected_p_value(walk, alpha, needed / (of * seen)).min() <= 0.1
    assert expected_p_value(walk, alpha, 0.99 * needed / (of * seen)).min() > 0.1


def test_no_number_of_samples_helps_an_exit_that_is_wrong_too_often():
    assert samples_needed(walk_of([(0.9, False), (0.5, True)]), 0.4, 0.1, 2) is None
    assert samples_needed(walk_of([(0.9, True), (0.9, False)]), 0.5, 0.1, 2) is None
    assert samples_needed(walk_of([(0.9, True), (0.5, False)]), 0.4, 0.1, 2) is not None

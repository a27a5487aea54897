from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom

from fedekd.early_exit.calibration.risk_curve import expected_p_value, required_samples, risk_curve

samples = st.lists(st.tuples(st.sampled_from([0.1, 0.25, 0.5, 0.9]), st.booleans()), max_size=30)


def curve_of(pairs):
    return risk_curve(np.array([score for score, _ in pairs]), np.array([right for _, right in pairs], dtype=bool))


@given(samples)
def test_risk_curve_has_one_threshold_per_distinct_score(pairs):
    curve = curve_of(pairs)
    thresholds = sorted({score for score, _ in pairs}, reverse=True)
    assert curve.thresholds.tolist() == thresholds
    assert curve.samples.tolist() == [sum(score >= threshold for score, _ in pairs) for threshold in thresholds]
    assert curve.errors.tolist() == [
        sum(score >= threshold and not right for score, right in pairs) for threshold in thresholds
    ]
    assert curve.risk.tolist() == [k / m for k, m in zip(curve.errors, curve.samples, strict=True)]


@given(samples, st.randoms())
def test_risk_curve_is_independent_of_sample_order(pairs, random):
    shuffled = list(pairs)
    random.shuffle(shuffled)
    for one, two in zip(curve_of(pairs), curve_of(shuffled), strict=True):
        assert one.tolist() == two.tolist()


def test_risk_curve_separates_adjacent_floats():
    close = float(np.nextafter(0.5, 1))
    assert curve_of([(0.5, True), (close, False)]).thresholds.tolist() == [close, 0.5]


def test_expected_p_value_scales_samples_and_errors():
    curve = curve_of([(0.9, True)] * 20 + [(0.5, False)] * 2 + [(0.5, True)] * 18)
    assert expected_p_value(curve, 0.1, 1.0) == pytest.approx([0.9**20, binom.cdf(2, 40, 0.1)], abs=1e-12)
    assert expected_p_value(curve, 0.1, 3.0) == pytest.approx([0.9**60, binom.cdf(6, 120, 0.1)], abs=1e-12)


@pytest.mark.parametrize(("errors", "right", "alpha"), [(0, 30, 0.05), (1, 99, 0.02), (3, 97, 0.05), (12, 88, 0.15)])
@pytest.mark.parametrize("of", [1, 4])
def test_required_samples_is_the_smallest_number_that_passes(errors, right, alpha, of):
    """One in `of` samples that enter the network reaches this exit."""
    seen = errors + right
    curve = curve_of([(0.9, place >= errors) for place in range(seen)])
    needed = required_samples(curve, alpha, 0.1, of * seen)
    assert expected_p_value(curve, alpha, needed / (of * seen)).min() <= 0.1
    assert expected_p_value(curve, alpha, 0.99 * needed / (of * seen)).min() > 0.1


def test_required_samples_risk_above_target_returns_none():
    assert required_samples(curve_of([(0.9, False), (0.5, True)]), 0.4, 0.1, 2) is None
    assert required_samples(curve_of([(0.9, True), (0.9, False)]), 0.5, 0.1, 2) is None
    assert required_samples(curve_of([(0.9, True), (0.5, False)]), 0.4, 0.1, 2) is not None

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, binomtest

from fedekd.functional.binomial import clopper_pearson, error_p_value, samples_without_error

alphas = st.floats(0.001, 0.6)


@given(st.integers(0, 3000), st.floats(0, 1), alphas)
def test_it_is_the_binomial_distribution(m, share, alpha):
    k = round(m * share)
    assert error_p_value(k, m, alpha) == pytest.approx(binom.cdf(k, m, alpha), abs=1e-12)


def test_it_is_the_sum_of_its_terms():
    """Written out, for numbers so small that nothing is lost."""
    for m in range(8):
        for k in range(m + 1):
            terms = [math.comb(m, wrong) * 0.3**wrong * 0.7 ** (m - wrong) for wrong in range(k + 1)]
            assert error_p_value(k, m, 0.3) == pytest.approx(sum(terms), abs=1e-14)


@given(st.integers(1, 400), alphas)
def test_more_errors_are_worse_and_more_samples_better(m, alpha):
    k = np.arange(m + 1)
    by_errors = error_p_value(k, np.full(m + 1, m), alpha)
    assert (np.diff(by_errors) >= 0).all()
    by_samples = error_p_value(np.full(m + 1, 2), 2 + k, alpha)
    assert (np.diff(by_samples) <= 0).all()
    assert by_errors.min() >= 0
    assert by_errors.max() <= 1


@pytest.mark.parametrize("alpha", [0.01, 0.5, 0.99])
def test_it_is_one_where_nothing_speaks_against_it(alpha):
    assert error_p_value([0, 1, 7, 5000], [0, 1, 7, 5000], alpha).tolist() == [1.0] * 4


@given(st.integers(0, 60), st.floats(0, 1), st.integers(1, 60), st.floats(0, 1), alphas)
def test_parts_of_samples_lie_between_whole_ones(k, more_errors, right, more_right, alpha):
    m = k + right
    low, high = error_p_value(k, m, alpha), error_p_value(k + 1, m + 1, alpha)
    assert low - 1e-12 <= error_p_value(k + more_errors, m + more_errors, alpha) <= high + 1e-12
    better = error_p_value(k, m + 1, alpha)
    assert better - 1e-12 <= error_p_value(k, m + more_right, alpha) <= low + 1e-12


def test_a_test_at_level_delta_errs_no_more_often():
    """Exactly: the probability of a p-value of at most delta where the error rate is alpha itself."""
    for alpha, delta, m in [(0.05, 0.1, 300), (0.01, 0.1, 335), (0.2, 0.05, 17), (0.1, 0.1, 3)]:
        k = np.arange(m + 1)
        passes = error_p_value(k, np.full(m + 1, m), alpha) <= delta
        assert binom.pmf(k, m, alpha)[passes].sum() <= delta


def test_samples_without_an_error_as_the_specification_counts_them():
    delta = 1 - 0.9 ** (1 / 3)
    assert [samples_without_error(alpha, delta) for alpha in (0.01, 0.02, 0.05, 0.1)] == [335, 167, 66, 32]


@given(st.floats(0.001, 0.9), st.floats(0.001, 0.9))
def test_samples_without_an_error_are_the_fewest(alpha, delta):
    m = samples_without_error(alpha, delta)
    assert m >= 1
    assert (1 - alpha) ** m <= delta
    assert m == 1 or (1 - alpha) ** (m - 1) > delta


def test_a_whole_quotient_of_logarithms_is_not_rounded_up():
    assert samples_without_error(0.5, 0.125) == 3
    assert samples_without_error(0.5, 0.5) == 1
    assert samples_without_error(0.9, 0.5) == 1
    assert samples_without_error(0.75, 2.0**-40) == 20


@pytest.mark.parametrize("level", [0.8, 0.95, 0.999])
@pytest.mark.parametrize(("k", "m"), [(0, 1), (1, 1), (0, 30), (30, 30), (3, 50), (49, 50), (61, 500), (500, 200000)])
def test_the_interval_is_scipy_s_exact_one(k, m, level):
    expected = binomtest(k, m).proportion_ci(confidence_level=level, method="exact")
    assert clopper_pearson(k, m, level) == pytest.approx((expected.low, expected.high), abs=1e-12)


@pytest.mark.parametrize(("k", "m"), [(-1, 5), (6, 5), (0, 0), (1, 0)])
def test_counts_that_cannot_be_are_refused(k, m):
    with pytest.raises(ValueError, match="cannot be"):
        clopper_pearson(k, m)

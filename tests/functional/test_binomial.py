from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import beta, binom

from fedekd.functional.binomial import clopper_pearson, error_p_value

alphas = st.floats(0.001, 0.6)


@given(st.integers(0, 3000), st.floats(0, 1), alphas)
def test_error_p_value_matches_binomial_cdf(m, share, alpha):
    k = round(m * share)
    assert error_p_value(k, m, alpha) == pytest.approx(binom.cdf(k, m, alpha), abs=1e-12)


def test_error_p_value_equals_sum_of_terms():
    for m in range(8):
        for k in range(m + 1):
            terms = [math.comb(m, wrong) * 0.3**wrong * 0.7 ** (m - wrong) for wrong in range(k + 1)]
            assert error_p_value(k, m, 0.3) == pytest.approx(sum(terms), abs=1e-14)


@given(st.integers(1, 400), alphas)
def test_error_p_value_increases_with_errors_and_decreases_with_samples(m, alpha):
    k = np.arange(m + 1)
    by_errors = error_p_value(k, np.full(m + 1, m), alpha)
    assert (np.diff(by_errors) >= 0).all()
    by_samples = error_p_value(np.full(m + 1, 2), 2 + k, alpha)
    assert (np.diff(by_samples) <= 0).all()
    assert by_errors.min() >= 0
    assert by_errors.max() <= 1


@pytest.mark.parametrize("alpha", [0.01, 0.5, 0.99])
def test_error_p_value_all_errors_is_1(alpha):
    assert error_p_value([0, 1, 7, 5000], [0, 1, 7, 5000], alpha).tolist() == [1.0] * 4


@given(st.integers(0, 60), st.floats(0, 1), st.integers(1, 60), st.floats(0, 1), alphas)
def test_error_p_value_fractional_counts_lie_between_integers(k, more_errors, right, more_right, alpha):
    m = k + right
    low, high = error_p_value(k, m, alpha), error_p_value(k + 1, m + 1, alpha)
    assert low - 1e-12 <= error_p_value(k + more_errors, m + more_errors, alpha) <= high + 1e-12
    better = error_p_value(k, m + 1, alpha)
    assert better - 1e-12 <= error_p_value(k, m + more_right, alpha) <= low + 1e-12


def test_error_p_value_test_has_level_delta():
    """Exact probability of a p-value of at most delta if the error rate is alpha."""
    for alpha, delta, m in [(0.05, 0.1, 300), (0.01, 0.1, 335), (0.2, 0.05, 17), (0.1, 0.1, 3)]:
        k = np.arange(m + 1)
        passes = error_p_value(k, np.full(m + 1, m), alpha) <= delta
        assert binom.pmf(k, m, alpha)[passes].sum() <= delta


@pytest.mark.parametrize(("k", "m"), [(0, 1), (1, 1), (0, 30), (30, 30), (3, 50), (49, 50), (61, 500), (500, 200000)])
@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.999])
def test_clopper_pearson_matches_beta_quantiles(k, m, confidence):
    tail = (1 - confidence) / 2
    low = 0.0 if k == 0 else beta.ppf(tail, k, m - k + 1)
    high = 1.0 if k == m else beta.ppf(1 - tail, k + 1, m - k)
    assert clopper_pearson(k, m, confidence) == pytest.approx((low, high), abs=1e-12)


@pytest.mark.parametrize(("k", "m"), [(-1, 5), (6, 5), (0, 0), (1, 0)])
def test_clopper_pearson_invalid_counts_raise_value_error(k, m):
    with pytest.raises(ValueError, match=r"must be|greater|integer|n"):
        clopper_pearson(k, m)

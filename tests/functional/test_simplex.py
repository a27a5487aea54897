"""The projection by its optimality conditions, and against a general solver."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize

from fedekd.functional import project_to_simplex

vectors = st.lists(st.floats(-50, 50), min_size=1, max_size=12)


@given(vectors)
def test_project_to_simplex_satisfies_optimality_conditions(values: list[float]) -> None:
    v = torch.tensor(values, dtype=torch.float64)
    w = project_to_simplex(v)
    assert (w >= 0).all()
    assert abs(float(w.sum()) - 1) <= 1e-12
    # w - v = mu - theta with mu >= 0, and mu = 0 wherever w > 0: one theta for all that stay.
    theta = (v - w)[w > 0]
    assert float(theta.max() - theta.min()) <= 1e-12 * max(1, v.abs().max())
    assert (v[w == 0] <= theta.mean() + 1e-12 * max(1, v.abs().max())).all()


@given(st.lists(st.floats(-2, 2), min_size=2, max_size=6))
def test_project_to_simplex_matches_general_solver(values: list[float]) -> None:
    v = np.array(values)
    solved = minimize(
        lambda w: ((w - v) ** 2).sum(),
        np.full(len(v), 1 / len(v)),
        jac=lambda w: 2 * (w - v),
        bounds=[(0, 1)] * len(v),
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1, "jac": lambda w: np.ones_like(w)},
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 500},
    )
    np.testing.assert_allclose(project_to_simplex(torch.tensor(v)).numpy(), solved.x, atol=1e-5)


@given(vectors, st.floats(-1e3, 1e3))
def test_project_to_simplex_ignores_constant(values: list[float], constant: float) -> None:
    v = torch.tensor(values, dtype=torch.float64)
    torch.testing.assert_close(project_to_simplex(v + constant), project_to_simplex(v), rtol=0, atol=1e-12)


def test_project_to_simplex_rows_and_fixed_points() -> None:
    table = torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    projected = project_to_simplex(table)
    for row, wanted in zip(table, projected, strict=True):
        torch.testing.assert_close(project_to_simplex(row), wanted, rtol=0, atol=0)
    torch.testing.assert_close(project_to_simplex(projected), projected, rtol=0, atol=1e-15)
    assert project_to_simplex(torch.tensor([-7.0])).tolist() == [1.0]
    assert project_to_simplex(torch.tensor([1e4, -1e4], dtype=torch.bfloat16)).tolist() == [1.0, 0.0]


@pytest.mark.parametrize("shape", [(), (0,), (2, 0), (1, 2, 3)])
def test_project_to_simplex_invalid_shape_raises_value_error(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="v: expected shape"):
        project_to_simplex(torch.zeros(shape))

"""Active exits and mixing weights against literal transcriptions of the paper's rules."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fedekd.functional import active_exits, average_state_dicts, cosine_similarities, mixing_weights, student_budget


@st.composite
def similarities(draw: st.DrawFn) -> Tensor:
    n = draw(st.integers(1, 9))
    values = draw(st.lists(st.sampled_from([-1.0, -0.5, -0.25, 0.0, 0.25, 1.0]), min_size=n * n, max_size=n * n))
    table = torch.tensor(values, dtype=torch.float64).reshape(n, n)
    table = table.triu(1) + table.triu(1).T
    return table.fill_diagonal_(1.0)


ROUNDS = st.integers(1, 40).flatmap(lambda total: st.tuples(st.integers(1, total), st.just(total)))


def literal_budget(table: Tensor, t: int, total: int, m: int) -> int:
    """In fractions, so that floor is of the number itself."""
    n = len(table)
    conflict = sum((Fraction(min(0.0, value)) for row in table.tolist() for value in row), Fraction(0)) / n**2
    most = 1 - Fraction(1, m)
    rho = min(max(most * 2 * t / total + conflict, Fraction(0)), most)
    return math.floor(rho * m * n)


def literal_active(table: Tensor, t: int, total: int, m: int, order: str) -> list[set[int]]:
    n, budget = len(table), literal_budget(table, t, total, m)
    c = [sum(min(0.0, value) for value in row) for row in table.tolist()]
    active = [{m - 1} for _ in range(n)]
    for e in range(m - 1) if order == "shallow_first" else range(m - 2, -1, -1):
        q = min(budget, n)
        for client in sorted(range(n), key=lambda i: (-c[i], i))[:q]:
            active[client].add(e)
        budget -= q
    return active


@given(similarities(), ROUNDS, st.integers(1, 5), st.sampled_from(["shallow_first", "deep_first"]))
def test_active_exits_match_literal_rules(table: Tensor, when: tuple[int, int], exits: int, order: str) -> None:
    budget = student_budget(table, *when, exits)
    assert budget == literal_budget(table, *when, exits)
    active = active_exits(table, *when, exits, order)  # type: ignore[arg-type]
    assert [set(row.nonzero().flatten().tolist()) for row in active] == literal_active(table, *when, exits, order)
    assert int(active.sum()) == len(table) + budget
    assert active[:, -1].all()


def test_active_exits_without_conflict_all_from_half_time() -> None:
    table = torch.eye(4)
    assert not active_exits(table, 1, 100, 3)[:, :2].any()
    assert [int(active_exits(table, t, 10, 3).sum()) for t in (1, 2, 3, 4, 5, 10)] == [5, 7, 8, 10, 12, 12]
    assert active_exits(table, 3, 10, 3).int().tolist() == [[1, 0, 1]] * 4
    assert active_exits(table, 3, 10, 3, "deep_first").int().tolist() == [[0, 1, 1]] * 4
    assert active_exits(table, 1, 100, 3, schedule="all_on").all()


def test_student_budget_whole_number_is_not_rounded_down() -> None:
    """1/2 * 2 * 1/49 * 2 * 49 is 2, and in floating point a little less."""
    assert (1 - 1 / 2) * 2 * 1 / 49 * 2 * 49 < 2
    assert student_budget(torch.eye(49), 1, 49, 2) == literal_budget(torch.eye(49), 1, 49, 2) == 2


def test_active_exits_most_conflicting_client_is_last() -> None:
    table = torch.eye(3)
    table[0, 1] = table[1, 0] = -0.5
    table[1, 2] = table[2, 1] = -0.25
    # c is -0.5, -0.75, -0.25, and the budget floor((1/2 * 2 * 2/5 - 1.5 / 9) * 2 * 3) = 1.
    assert active_exits(table, 2, 5, 2)[:, 0].tolist() == [False, False, True]


def test_cosine_similarities_match_torch() -> None:
    updates = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    found = cosine_similarities(updates)
    for i in range(5):
        for j in range(5):
            a, b = updates[i].double().numpy(), updates[j].double().numpy()
            assert float(found[i, j]) == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b), abs=1e-14)
    assert torch.equal(found, found.T)
    still = cosine_similarities(torch.tensor([[0.0, 0.0], [1.0, 1.0]]))
    assert still.tolist() == [[1.0, 0.0], [0.0, 1.0]]
    tiny = cosine_similarities(torch.tensor([[1e-30, 0.0], [1e-30, 1e-30]]))
    assert float(tiny[0, 1]) == pytest.approx(math.sqrt(0.5))


def test_mixing_weights_are_simplex_projection() -> None:
    table = torch.tensor([[1.0, 0.2, -0.6], [0.0, 0.0, 0.0]], dtype=torch.float64)
    weights = mixing_weights(table, spread=1.0)
    # 5/6, 13/30 and 1/30 sum to 1.3: the last gives all it has, and the others share the rest.
    assert weights[0].tolist() == pytest.approx([0.7, 0.3, 0.0], abs=1e-12)
    assert weights[1].tolist() == pytest.approx([1 / 3] * 3, abs=1e-15)
    assert mixing_weights(table, spread=1e12)[0].tolist() == pytest.approx([1 / 3] * 3, abs=1e-11)
    assert mixing_weights(table, spread=1e-6)[0].tolist() == [1.0, 0.0, 0.0]


def test_mixing_weights_linear_heads_merge_into_one() -> None:
    """The client-decoupled form: the mixture of the heads' logits is the logits of the mixed head."""
    torch.manual_seed(0)
    heads, features = [nn.Linear(16, 10) for _ in range(5)], torch.randn(64, 16)
    for row in mixing_weights(cosine_similarities(torch.randn(5, 170))).tolist():
        mixed = nn.Linear(16, 10)
        mixed.load_state_dict(average_state_dicts([head.state_dict() for head in heads], row))
        teachers = sum(weight * head(features) for weight, head in zip(row, heads, strict=True))
        torch.testing.assert_close(mixed(features), teachers, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: cosine_similarities(torch.zeros(3)), "updates"),
        (lambda: active_exits(torch.zeros(2, 3), 1, 1, 2), "similarities"),
        (lambda: active_exits(torch.zeros(0, 0), 1, 1, 2), "similarities"),
        (lambda: active_exits(torch.eye(2), 0, 1, 2), r"round_idx.* got 0 and 2"),
        (lambda: active_exits(torch.eye(2), 2, 1, 2), r"round_idx.* got 2 and 2"),
        (lambda: active_exits(torch.eye(2), 1, 1, 2, "deep"), "order"),  # type: ignore[arg-type]
        (lambda: active_exits(torch.eye(2), 1, 1, 2, schedule="on"), "schedule"),  # type: ignore[arg-type]
        (lambda: mixing_weights(torch.zeros(3)), "similarities"),
        (lambda: mixing_weights(torch.zeros(2, 0)), "similarities"),
        (lambda: mixing_weights(torch.eye(2), spread=0.0), "spread"),
    ],
)
def test_exit_scheduling_invalid_arguments_raise_value_error(call: Callable[[], Tensor], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()

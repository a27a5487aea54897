"""Losses of DepthFL and ScaleFL, and their schedules, against literal transcriptions in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedekd.errors import UserError
from fedekd.federation import RoundOptions
from fedekd.methods import DepthFL, ScaleFL
from fedekd.models import PrivateCNN, multi_exit
from fedekd.modules import ModelOutput, MutualExitLoss
from tests.federation.runs import assert_equal_weights

from .conftest import Federate, differ, make_spec, one_round
from .test_submodels import options, started

BATCH, CLASSES = 5, 4
NETWORK = multi_exit(PrivateCNN(1, 8, CLASSES), CLASSES, 3)
EXITS, SEEDS = st.integers(1, 3), st.integers(0, 10_000)
WHEN = st.integers(1, 12).flatmap(lambda rounds: st.tuples(st.integers(0, rounds - 1), st.just(rounds)))


def total_loss(method: Any, exits: Sequence[Tensor], targets: Tensor, round_idx: int, rounds: int) -> Tensor:
    """Sum the loss terms of a method for a client with these exits."""
    client: Any = SimpleNamespace(spec=make_spec(rounds=rounds))
    terms = method.loss_terms(client, NETWORK.shallow(len(exits)), round_idx)
    return sum(term(ModelOutput(tuple(exits)), None, targets, lambda name, value: None) for term in terms)  # type: ignore[return-value]


def batch(exits: int, seed: int) -> tuple[list[Tensor], Tensor]:
    torch.manual_seed(seed)
    logits = [3 * torch.randn(BATCH, CLASSES, dtype=torch.float64) for _ in range(exits)]
    return [exit_.requires_grad_() for exit_ in logits], torch.randint(CLASSES, (BATCH,))


def softmax(row: Sequence[float], temperature: float = 1.0) -> list[float]:
    powers = [math.exp(value / temperature) for value in row]
    return [power / sum(powers) for power in powers]


def kl(teacher: Sequence[float], student: Sequence[float], temperature: float = 1.0) -> float:
    q, p = softmax(teacher, temperature), softmax(student, temperature)
    return sum(a * math.log(a / b) for a, b in zip(q, p, strict=True))


def cross_entropy(row: Sequence[float], label: int) -> float:
    return -math.log(softmax(row)[label])


def literal_ramp(weight: float, r: float, t: int, rounds: int) -> float:
    done = 1.0 if r == 0 else min(1.0, t / (r * rounds))
    return weight * math.exp(-5 * (1 - done) ** 2)


@given(EXITS, SEEDS, st.floats(0, 3), st.sampled_from([0.0, 0.3, 0.5, 1.0]), WHEN)
def test_depthfl_loss_matches_docstring_in_value_and_gradient(
    exits: int, seed: int, weight: float, ramp_up: float, when: tuple[int, int]
) -> None:
    logits, targets = batch(exits, seed)
    rows = [exit_.tolist() for exit_ in logits]
    lam, loss = literal_ramp(weight, ramp_up, *when), 0.0
    gradient = torch.zeros(exits, BATCH, CLASSES, dtype=torch.float64)
    for i, label in enumerate(targets.tolist()):
        for e in range(exits):
            loss += cross_entropy(rows[e][i], label) / exits / BATCH
            student = softmax(rows[e][i])
            for c in range(CLASSES):
                gradient[e, i, c] += (student[c] - (c == label)) / exits / BATCH
            for j in range(exits):
                if j != e:
                    loss += lam * kl(rows[j][i], rows[e][i]) / (exits * (exits - 1)) / BATCH
                    for c, other in enumerate(softmax(rows[j][i])):
                        gradient[e, i, c] += lam * (student[c] - other) / (exits * (exits - 1)) / BATCH
    loss_value = total_loss(DepthFL(weight, ramp_up), logits, targets, *when)
    assert loss_value.item() == pytest.approx(loss, rel=1e-12)
    # No gradient flows through the teaching exits.
    torch.testing.assert_close(torch.stack(torch.autograd.grad(loss_value, logits)), gradient, rtol=0, atol=1e-12)


@given(EXITS, SEEDS, st.floats(0, 3), st.sampled_from([0.5, 1.0, 3.0]), st.booleans())
def test_scalefl_loss_matches_docstring_in_value_and_gradient(
    exits: int, seed: int, weight: float, temperature: float, warm: bool
) -> None:
    logits, targets = batch(exits, seed)
    rows = [exit_.tolist() for exit_ in logits]
    gamma, loss = weight if warm else 0.0, 0.0
    gradient = torch.zeros(exits, BATCH, CLASSES, dtype=torch.float64)
    for i, label in enumerate(targets.tolist()):
        for e in range(exits):
            w = 2 * (e + 1) / (exits * (exits + 1))
            loss += w * cross_entropy(rows[e][i], label) / BATCH
            for c, probability in enumerate(softmax(rows[e][i])):
                gradient[e, i, c] += w * (probability - (c == label)) / BATCH
            if e < exits - 1:
                deepest = rows[-1][i]
                loss += gamma * w * temperature**2 * kl(deepest, rows[e][i], temperature) / BATCH
                student, teacher = softmax(rows[e][i], temperature), softmax(deepest, temperature)
                for c in range(CLASSES):
                    gradient[e, i, c] += gamma * w * temperature * (student[c] - teacher[c]) / BATCH
    method = ScaleFL(weight, temperature, warm_up=0.5)
    loss_value = total_loss(method, logits, targets, 2 if warm else 1, 4)
    assert loss_value.item() == pytest.approx(loss, rel=1e-12)
    torch.testing.assert_close(torch.stack(torch.autograd.grad(loss_value, logits)), gradient, rtol=0, atol=1e-12)


@pytest.mark.parametrize("ramp_up", [0.0, 0.3, 1.0])
def test_depthfl_weight_rises_to_lambda(ramp_up: float) -> None:
    method, rounds = DepthFL(2.0, ramp_up), 10
    ramp = [method.distillation_weight_at(round_idx, rounds) for round_idx in range(rounds + 1)]
    assert ramp == pytest.approx([literal_ramp(2.0, ramp_up, t, rounds) for t in range(rounds + 1)])
    assert ramp == sorted(ramp)
    assert [weight == 2.0 for weight in ramp] == [t >= ramp_up * rounds for t in range(rounds + 1)]
    assert ramp[0] == pytest.approx(2.0 * (math.exp(-5) if ramp_up else 1.0))


@pytest.mark.parametrize("rounds", [1, 3, 4, 10, 25, 100])
@pytest.mark.parametrize("warm_up", ["0", "0.07", "0.25", "0.28", "0.55", "1"])
def test_scalefl_distils_after_warm_up(warm_up: str, rounds: int) -> None:
    method = ScaleFL(warm_up=float(warm_up))
    logits, targets = batch(2, 0)
    plain = total_loss(ScaleFL(0.0), logits, targets, 0, rounds).item()
    teacher_outputs = [
        total_loss(method, logits, targets, round_idx, rounds).item() != plain for round_idx in range(rounds)
    ]
    assert teacher_outputs == [round_idx >= Fraction(warm_up) * rounds for round_idx in range(rounds)]


@pytest.mark.parametrize(("method", "begins"), [(lambda a: ScaleFL(a, warm_up=0.5), 1), (DepthFL, 0)])
def test_the_round_and_the_exits_of_a_client_reach_its_loss(
    method: Callable[[float], Any], begins: int, federate: Federate
) -> None:
    client = options(depths=[1, 2, 3])
    ours, plain = (
        started(federate(method(weight), client=client, rounds=RoundOptions(rounds=2))) for weight in (1.0, 0.0)
    )
    for round_idx in range(2):
        ups = [one_round(run, [0, 1, 2], round_idx) for run in (ours, plain)]
        states = [[update.state for update in up] for up in ups]
        moved = [differ(*pair) for pair in zip(*states, strict=True)]
        assert moved == ([False] * 3 if round_idx < begins else [False, True, True])
        # What was learned with distillation would differ anyway after that.
        plain.method.server_state = ours.method.server_state


def test_scalefl_that_never_warms_up_is_scalefl_without_distillation(federate: Federate) -> None:
    runs = [federate(ScaleFL(weight, warm_up=1.0), client=options()) for weight in (0.0, 5.0)]
    assert runs[0].run()["clients"] == runs[1].run()["clients"]
    assert_equal_weights(*(run.method.server_state["model"] for run in runs))


def test_a_single_exit_has_nobody_to_learn_from() -> None:
    logits, targets = batch(1, 0)
    assert MutualExitLoss(3.0)(ModelOutput(tuple(logits)), None, targets, print).item() == 0.0  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: DepthFL(distillation_weight=-1.0), r"method\.distillation_weight: .* got -1\.0"),
        (lambda: DepthFL(distillation_weight=math.inf), r"method\.distillation_weight: .* got inf"),
        (lambda: DepthFL(ramp_up=1.5), r"method\.ramp_up: .* got 1\.5"),
        (lambda: DepthFL(ramp_up=math.nan), r"method\.ramp_up: .* got nan"),
        (lambda: DepthFL(weights="equal"), r"weights: .* got 'equal'"),  # type: ignore[arg-type]
        (lambda: ScaleFL(distillation_weight=-1.0), r"method\.distillation_weight: .* got -1\.0"),
        (lambda: ScaleFL(temperature=0.0), r"method\.temperature: .* got 0\.0"),
        (lambda: ScaleFL(warm_up=-0.1), r"method\.warm_up: .* got -0\.1"),
        (lambda: ScaleFL(weights="equal"), r"weights: .* got 'equal'"),  # type: ignore[arg-type]
    ],
)
def test_submodel_method_invalid_argument_raises_user_error(make: Callable[[], Any], words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        make()
    assert "\n" not in str(error.value)

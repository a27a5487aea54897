"""Gated distillation of a private model with exits, against a literal transcription in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedekd.errors import UserError
from fedekd.methods import FedeKD
from fedekd.models import PrivateCNN, ProxyCNN, multi_exit
from fedekd.modules import GatedPrivateModule, HeldOutTrust

BETA, LAMBDA, CONSISTENCY, T = 1.5, 0.7, 0.3, 2.0


def softmax(row: Sequence[float], temperature: float = 1.0) -> list[float]:
    top = max(row)
    powers = [math.exp((value - top) / temperature) for value in row]
    return [power / sum(powers) for power in powers]


def kl(p: Sequence[float], q: Sequence[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def entropy(p: Sequence[float]) -> float:
    return -sum(a * math.log(a) for a in p if a > 0)


def literal_loss(
    exits: Sequence[Tensor],
    proxy: Tensor,
    targets: Tensor,
    active: Sequence[bool],
    held_out: Sequence[float] | None = None,
    sign: int = 1,
) -> float:
    """Loss in the docstring of GatedPrivateModule with Eq. 1 and 3, sample by sample."""
    total, teacher = 0.0, [softmax(row) for row in proxy.tolist()]
    deepest = exits[-1].tolist()
    for index, logits in enumerate(exits):
        if not active[index]:
            continue
        student = [softmax(row) for row in logits.tolist()]
        size = len(student)
        energy = [
            0.5 * (kl(p, q) + kl(q, p)) / (entropy(p) + entropy(q) + 1e-8)
            for p, q in zip(student, teacher, strict=True)
        ]
        mean = sum(energy) / size
        spread = math.sqrt(sum((value - mean) ** 2 for value in energy) / size)
        trust = [1 / (1 + math.exp(sign * BETA * (value - mean) / (spread + 1e-8))) for value in energy]
        trust = trust if held_out is None else list(held_out)
        total += sum(-math.log(p[int(y)]) for p, y in zip(student, targets, strict=True)) / size
        total += LAMBDA * sum(w * kl(q, p) for w, p, q in zip(trust, student, teacher, strict=True)) / size
        if index < len(exits) - 1:
            pairs = zip(deepest, logits.tolist(), strict=True)
            total += CONSISTENCY * T**2 * sum(kl(softmax(d, T), softmax(s, T)) for d, s in pairs) / size
    return total / len(exits)


@pytest.fixture
def batch() -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    torch.manual_seed(3)
    private = multi_exit(PrivateCNN(1, 8, 4), 4).double()
    proxy = ProxyCNN(1, 8, 4).double()
    for network in (private, proxy):  # new networks have nearly uniform predictions
        for parameter in network.parameters():
            parameter.data.mul_(2.0)
    return private, proxy, torch.randn(7, 1, 8, 8, dtype=torch.float64), torch.randint(0, 4, (7,))


@pytest.mark.parametrize("active", [(True, True, True), (True, False, True), (False, False, True)])
def test_gated_private_module_with_exits_matches_docstring_loss(
    batch: tuple[nn.Module, nn.Module, Tensor, Tensor], active: tuple[bool, ...]
) -> None:
    private, proxy, x, y = batch
    module = GatedPrivateModule(
        private, proxy, beta=BETA, lambda_kd=LAMBDA, active=active, consistency_weight=CONSISTENCY
    )
    wanted = literal_loss([z.detach() for z in private(x)], proxy(x).detach(), y, active)
    assert module.training_step((x, y), 0).item() == pytest.approx(wanted, rel=1e-10)


@pytest.mark.parametrize("gate", ["reversed", "correctness"])
def test_gated_private_module_with_exits_matches_docstring_loss_with_other_gates(
    batch: tuple[nn.Module, nn.Module, Tensor, Tensor], gate: Any
) -> None:
    private, proxy, x, y = batch
    with torch.no_grad():
        outputs, logits = private(x), proxy(x)
    trust = HeldOutTrust("classification", logits, logits.argmax(1) * torch.tensor([1, 0] * 3 + [1]))
    active = (True, False, True)
    module = GatedPrivateModule(
        private,
        proxy,
        beta=BETA,
        lambda_kd=LAMBDA,
        gate=gate,
        active=active,
        consistency_weight=CONSISTENCY,
        trust=trust,
    )
    held_out = None if gate == "reversed" else trust(logits).tolist()
    assert held_out is None or len(set(held_out)) > 1
    wanted = literal_loss(outputs, logits, y, active, held_out, sign=-1)
    assert module.training_step((x, y), 0).item() == pytest.approx(wanted, rel=1e-10)


def test_gated_private_module_inactive_exits_get_no_gradient(
    batch: tuple[nn.Module, nn.Module, Tensor, Tensor],
) -> None:
    private, proxy, x, y = batch
    module = GatedPrivateModule(private, proxy, active=[False, True, True], consistency_weight=1.0)
    module.training_step((x, y), 0).backward()
    heads = {name: parameter.grad for name, parameter in private.named_parameters() if name.startswith("heads.")}
    assert all((gradient is None) == name.startswith("heads.0.") for name, gradient in heads.items())


def test_gated_private_module_has_one_gate_per_exit(batch: tuple[nn.Module, nn.Module, Tensor, Tensor]) -> None:
    private, proxy, x, y = batch
    module = GatedPrivateModule(private, proxy)
    recorded: dict[str, float] = {}
    module.record = lambda name, value: recorded.update({name: float(value)})  # type: ignore[method-assign]
    module.training_step((x, y), 0)
    energies = [recorded[f"{exit_}gate/energy_mean"] for exit_ in ("exit_1/", "exit_2/", "")]
    assert len(set(energies)) == 3
    assert "exit_3/gate/energy_mean" not in recorded


def test_fedekd_progressive_schedule_adds_shallow_exits() -> None:
    class Stub:
        class spec:  # noqa: N801
            rounds = 8

        networks = {"private": multi_exit(PrivateCNN(1, 8, 4), 4)}  # noqa: RUF012

    method = FedeKD(schedule="progressive")
    counts = [sum(method._active_exits(Stub(), round_idx)) for round_idx in range(1, 9)]  # type: ignore[arg-type]
    assert counts == [1, 2, 2, 3, 3, 3, 3, 3]  # the deepest, and floor(2/3 * 2t/8 * 3) shallow ones, at most two
    assert method._active_exits(Stub(), 2) == [True, False, True]  # type: ignore[arg-type]
    assert FedeKD()._active_exits(Stub(), 1) is None  # type: ignore[arg-type]


def test_fedekd_invalid_exit_options_raise_user_error() -> None:
    with pytest.raises(UserError, match=r"method\.schedule: expected one of"):
        FedeKD(schedule="on")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"method\.consistency_weight: expected a finite number of at least 0, got -1"):
        FedeKD(consistency_weight=-1.0)
    with pytest.raises(UserError, match="consistency_weight: expected 0 for regression"):
        GatedPrivateModule(multi_exit(PrivateCNN(1, 8, 1), 1), ProxyCNN(1, 8, 1), "regression", consistency_weight=1.0)

"""The score `agreement`, which uses a proxy."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from fedekd.early_exit import ExitPolicy, early_exit_forward, exit_index, network_fingerprint
from fedekd.errors import UserError
from fedekd.functional import agreement_confidence, score_exit
from fedekd.models import ExitCosts, PrivateCNN, ProxyCNN, exit_costs, multi_exit

GAMMA = 0.4


def literal_agreement(logits: list[float], other: list[float]) -> float:
    def softmax(row: list[float]) -> list[float]:
        powers = [math.exp(value - max(row)) for value in row]
        return [power / sum(powers) for power in powers]

    p, q = softmax(logits), softmax(other)
    divergence = 0.5 * sum((a - b) * math.log(a / b) for a, b in zip(p, q, strict=True))
    entropy = -sum(a * math.log(a) for a in (*p, *q))
    return max(p) - GAMMA * divergence / (entropy + 1e-8)


@pytest.fixture
def networks() -> tuple[nn.Module, nn.Module, Tensor]:
    torch.manual_seed(0)
    network, proxy = multi_exit(PrivateCNN(1, 8, 4), 4).double(), ProxyCNN(1, 8, 4).double()
    for each in (network, proxy):
        for parameter in each.parameters():
            parameter.data.mul_(2.5)  # untrained networks have low confidence
    return network, proxy, torch.randn(40, 1, 8, 8, dtype=torch.float64)


def test_agreement_equals_literal_transcription() -> None:
    torch.manual_seed(1)
    logits, other = 3 * torch.randn(2, 30, 5, dtype=torch.float64)
    expected = [literal_agreement(a, b) for a, b in zip(logits.tolist(), other.tolist(), strict=True)]
    torch.testing.assert_close(agreement_confidence(logits, other, GAMMA), torch.tensor(expected).double())
    assert torch.equal(score_exit("agreement", logits, other, 0.0), score_exit("max_softmax", logits))
    with pytest.raises(ValueError, match="proxy"):
        score_exit("agreement", logits)


@pytest.mark.parametrize(
    ("first", "second", "search_bound"), [(0.5, 0.4, 0.5), (0.7, 0.2, 0.3), (math.inf, 0.3, math.inf)]
)
def test_forward_agreement_exits_equal_exit_index(
    networks: tuple[nn.Module, nn.Module, Tensor], first: float, second: float, search_bound: float
) -> None:
    network, proxy, x = networks
    thresholds, search_bounds = (first, second, -math.inf), (min(first, search_bound), second, -math.inf)
    with torch.no_grad():
        scores = torch.stack([agreement_confidence(z, proxy(x), GAMMA) for z in network(x)], dim=1)
    expected = exit_index(scores.numpy(), thresholds, search_bounds)
    output = early_exit_forward(network, x, thresholds, search_bounds, "agreement", proxy, GAMMA)  # type: ignore[arg-type]
    assert output.exits.tolist() == expected.tolist()
    assert len(set(expected)) > 1
    torch.testing.assert_close(output.scores, scores[torch.arange(len(x)), output.exits])


def test_costs_include_proxy_if_an_early_exit_is_evaluated(networks: tuple[nn.Module, nn.Module, Tensor]) -> None:
    costs = ExitCosts((100, 200), (10, 20), proxy=7)
    assert costs.flops_at_exits([True, True]) == (110, 330)
    assert costs.flops_at_exits([True, True], uses_proxy=True) == (117, 337)
    assert costs.flops_at_exits([False, True], uses_proxy=True) == (110, 320)
    network, proxy, _ = networks
    without_proxy = exit_costs(network, (1, 8, 8))  # type: ignore[arg-type]
    counted = exit_costs(network, (1, 8, 8), proxy)  # type: ignore[arg-type]
    assert counted.proxy > 0
    assert (counted.stages, counted.heads) == (without_proxy.stages, without_proxy.heads)


def test_forward_all_exits_closed_skips_proxy(networks: tuple[nn.Module, nn.Module, Tensor]) -> None:
    network, _, x = networks

    class Forbidden(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise AssertionError("the proxy was evaluated")

    thresholds = (math.inf, math.inf, -math.inf)
    output = early_exit_forward(network, x, thresholds, score="agreement", proxy=Forbidden())  # type: ignore[arg-type]
    assert set(output.exits.tolist()) == {2}


def test_policy_requires_its_proxy(networks: tuple[nn.Module, nn.Module, Tensor]) -> None:
    network, proxy, x = networks
    policy = ExitPolicy(
        thresholds=(0.5, 0.4, -math.inf),
        search_bounds=(0.5, 0.4, -math.inf),
        certified=(True, True, False),
        target_risk=0.1,
        confidence=0.9,
        mode="ltt",
        score="agreement",
        network=network_fingerprint(network),
        gamma=GAMMA,
        proxy=network_fingerprint(proxy),
    )
    again = ExitPolicy.from_json(policy.to_json())
    assert again == policy
    again.predict(network, x, proxy)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="expected a proxy for the score"):
        again.predict(network, x)  # type: ignore[arg-type]
    with torch.no_grad():
        next(proxy.parameters()).add_(1.0)
    with pytest.raises(UserError, match="expected the proxy"):
        again.predict(network, x, proxy)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="proxy: expected a network"):
        early_exit_forward(network, x, (0.5, 0.4, -math.inf), score="agreement")  # type: ignore[arg-type]

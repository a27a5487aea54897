"""The score that asks a proxy: leaving early costs its opinion, and skipping changes no outcome."""

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
    apart = 0.5 * sum((a - b) * math.log(a / b) for a, b in zip(p, q, strict=True))
    unsure = -sum(a * math.log(a) for a in (*p, *q))
    return max(p) - GAMMA * apart / (unsure + 1e-8)


@pytest.fixture
def networks() -> tuple[nn.Module, nn.Module, Tensor]:
    torch.manual_seed(0)
    network, proxy = multi_exit(PrivateCNN(1, 8, 4), 4).double(), ProxyCNN(1, 8, 4).double()
    for each in (network, proxy):
        for parameter in each.parameters():
            parameter.data.mul_(2.5)  # fresh networks are hardly sure of anything
    return network, proxy, torch.randn(40, 1, 8, 8, dtype=torch.float64)


def test_it_is_confidence_less_disagreement() -> None:
    torch.manual_seed(1)
    logits, other = 3 * torch.randn(2, 30, 5, dtype=torch.float64)
    wanted = [literal_agreement(a, b) for a, b in zip(logits.tolist(), other.tolist(), strict=True)]
    torch.testing.assert_close(agreement_confidence(logits, other, GAMMA), torch.tensor(wanted).double())
    assert torch.equal(score_exit("agreement", logits, other, 0.0), score_exit("max_softmax", logits))
    with pytest.raises(ValueError, match="proxy"):
        score_exit("agreement", logits)


@pytest.mark.parametrize(
    ("first", "second", "search_bound"), [(0.5, 0.4, 0.5), (0.7, 0.2, 0.3), (math.inf, 0.3, math.inf)]
)
def test_skipping_gives_what_all_scores_would(
    networks: tuple[nn.Module, nn.Module, Tensor], first: float, second: float, search_bound: float
) -> None:
    network, proxy, x = networks
    thresholds, search_bounds = (first, second, -math.inf), (min(first, search_bound), second, -math.inf)
    with torch.no_grad():
        scores = torch.stack([agreement_confidence(z, proxy(x), GAMMA) for z in network(x)], dim=1)
    wanted = exit_index(scores.numpy(), thresholds, search_bounds)
    found = early_exit_forward(network, x, thresholds, search_bounds, "agreement", proxy, GAMMA)  # type: ignore[arg-type]
    assert found.exits.tolist() == wanted.tolist()
    assert len(set(wanted)) > 1
    torch.testing.assert_close(found.scores, scores[torch.arange(len(x)), found.exits])


def test_the_proxy_is_paid_for_where_anyone_may_leave(networks: tuple[nn.Module, nn.Module, Tensor]) -> None:
    costs = ExitCosts((100, 200), (10, 20), proxy=7)
    assert costs.leaving([True, True]) == (110, 330)
    assert costs.leaving([True, True], uses_proxy=True) == (117, 337)
    assert costs.leaving([False, True], uses_proxy=True) == (110, 320)
    network, proxy, _ = networks
    alone = exit_costs(network, (1, 8, 8))  # type: ignore[arg-type]
    counted = exit_costs(network, (1, 8, 8), proxy)  # type: ignore[arg-type]
    assert counted.proxy > 0
    assert (counted.stages, counted.heads) == (alone.stages, alone.heads)


def test_the_proxy_is_not_asked_where_nobody_may_leave(networks: tuple[nn.Module, nn.Module, Tensor]) -> None:
    network, _, x = networks

    class Silent(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise AssertionError("asked")

    thresholds = (math.inf, math.inf, -math.inf)
    found = early_exit_forward(network, x, thresholds, score="agreement", proxy=Silent())  # type: ignore[arg-type]
    assert set(found.exits.tolist()) == {2}


def test_a_policy_knows_its_proxy_again(networks: tuple[nn.Module, nn.Module, Tensor]) -> None:
    network, proxy, x = networks
    policy = ExitPolicy(
        thresholds=(0.5, 0.4, -math.inf),
        search_bounds=(0.5, 0.4, -math.inf),
        certified=(True, True, False),
        alpha=0.1,
        delta=0.1,
        mode="ltt",
        score="agreement",
        network=network_fingerprint(network),
        gamma=GAMMA,
        proxy=network_fingerprint(proxy),
    )
    again = ExitPolicy.from_json(policy.to_json())
    assert again == policy
    again.predict(network, x, proxy)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="asks a proxy"):
        again.predict(network, x)  # type: ignore[arg-type]
    with torch.no_grad():
        next(proxy.parameters()).add_(1.0)
    with pytest.raises(UserError, match="calibrated for proxy"):
        again.predict(network, x, proxy)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="needs the proxy"):
        early_exit_forward(network, x, (0.5, 0.4, -math.inf), score="agreement")  # type: ignore[arg-type]

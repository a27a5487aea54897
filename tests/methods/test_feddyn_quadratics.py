"""FedDyn on quadratics with a known optimum: it converges to the global one, FedAvg does not."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedekd.methods import FedAvg, FedDyn, FedProx
from fedekd.modules import ModelOutput


class Point(nn.Module):
    """Network that returns its weights."""

    def __init__(self, dimension: int) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(dimension, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.theta


class QuadraticClient:
    """Client with loss 1/2 (theta - c)' A (theta - c) plus the method's terms, minimised by one Newton step."""

    def __init__(self, number: int, curvature: Tensor, centre: Tensor, spec: Any) -> None:
        self.number, self.curvature, self.centre, self.spec = number, curvature, centre, spec
        self.networks = {"private": Point(len(centre))}
        self.method_state: dict[str, Any] = {}
        self.splits = SimpleNamespace(train=[0])

    def train_supervised(self, module: Any, round_idx: int) -> dict[str, float]:
        theta = self.networks["private"].theta
        output = ModelOutput((torch.zeros(1),))

        def loss(point: Tensor) -> Tensor:
            with torch.no_grad():
                theta.copy_(point.detach())
            offset = theta - self.centre
            terms = [0.5 * offset @ self.curvature @ offset]
            terms += [
                term(output, None, torch.zeros(1), lambda *_: None)
                for term in module.loss_terms
                if term.name != "supervised"
            ]
            return torch.stack(terms).sum()

        start = theta.detach().clone()
        gradient = torch.autograd.grad(loss(start), theta)[0]
        columns = [
            torch.autograd.grad(loss(start + unit), theta)[0] - gradient for unit in torch.eye(len(start)).double()
        ]
        with torch.no_grad():
            theta.copy_(start - torch.linalg.solve(torch.stack(columns, dim=1), gradient))
        return {}


def federation(method: Any, rounds: int, share: int | None = None) -> tuple[Tensor, Tensor, Any]:
    """Return the global model after some rounds, the optimum, and the clients."""
    generator = torch.Generator().manual_seed(0)
    dimension, num_clients = 4, 5
    spec = SimpleNamespace(
        task="regression",
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0),
        client=SimpleNamespace(local_epochs=1),
        num_clients=num_clients,
        rounds=10**9,
        build_model=lambda role, client_id: Point(dimension),
        require_one_architecture=lambda name: None,
    )
    clients = []
    for number in range(num_clients):
        root = torch.randn(dimension, dimension, generator=generator, dtype=torch.float64)
        curvature = root @ root.T + 0.5 * torch.eye(dimension, dtype=torch.float64)
        centre = 3 * torch.randn(dimension, generator=generator, dtype=torch.float64)
        clients.append(QuadraticClient(number, curvature, centre, spec))
    total = torch.stack([client.curvature for client in clients]).sum(0)
    optimum = torch.linalg.solve(total, torch.stack([c.curvature @ c.centre for c in clients]).sum(0))
    method.init_server(spec)
    for round_idx in range(rounds):
        participants = (
            clients if share is None else [clients[i] for i in torch.randperm(num_clients, generator=generator)[:share]]
        )
        sent = method.broadcast([c.number for c in participants], round_idx)
        updates = []
        for client in participants:
            method.receive(client, sent.to(client.number), round_idx)
            updates.append(method.prepare_update(client, round_idx))
        method.aggregate([type(u)(u.client, {n: t.clone() for n, t in u.state.items()}, 1) for u in updates], round_idx)
    return method.server_state["model"]["theta"], optimum, clients


@pytest.mark.slow
@pytest.mark.parametrize(("share", "rounds"), [(None, 250), (2, 700)])
def test_feddyn_reaches_the_global_optimum(share: int | None, rounds: int) -> None:
    method = FedDyn(alpha=1.0)
    theta, optimum, clients = federation(method, rounds, share)
    torch.testing.assert_close(theta, optimum, rtol=0, atol=1e-8)
    h = torch.stack([client.method_state["g"]["theta"] for client in clients]).mean(0)
    torch.testing.assert_close(method.server_state["h"]["theta"], h, rtol=0, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("method", [FedAvg, lambda: FedProx(mu=1.0)])
def test_fedavg_and_fedprox_do_not_reach_the_global_optimum(method: Any) -> None:
    theta, optimum, _ = federation(method(), 100)
    assert float((theta - optimum).norm()) > 0.1


@pytest.mark.parametrize("alpha", [0.01, 0.1, 1.0])
def test_feddyn_first_step_is_twice_the_mean_step(alpha: float) -> None:
    """theta^1 = theta^0 + 2 mean(delta), since g = 0 at first: with theta^0 = 0, twice the mean of theta_k."""
    theta, _, clients = federation(FedDyn(alpha=alpha), 1)
    mean = torch.stack([client.networks["private"].theta.detach() for client in clients]).mean(0)
    torch.testing.assert_close(theta, 2 * mean, rtol=1e-9, atol=1e-12)

"""Ditto: a personal model held near the global one (Li et al., ICML 2021)."""

from __future__ import annotations

from typing import Literal

from fedekd.errors import UserError
from fedekd.functional import Aggregator
from fedekd.methods.base import StateDict, Update
from fedekd.methods.client import Client
from fedekd.methods.fedavg import FedAvg
from fedekd.modules import LossTerm, ObjectiveModule, SupervisedLoss, SupervisedModule
from fedekd.modules.losses.regularizers import ProximalPenalty, trainable


class Ditto(FedAvg):
    """FedAvg in the background, and for each client a model of its own that minimises L_k(v) + (lam / 2) ||v - w||^2.

    w is the global model. The personal models start where Local's do and are trained with its batches; with lam 0
    they are Local's, bit for bit.

    Args:
        lam: How strongly a personal model is held to the global one, at least 0.
        weights: uniform counts every client alike, samples by its training samples.
        aggregator: Another way to merge, by class_path; null takes the mean with `weights`.
    """

    def __init__(
        self,
        lam: float = 0.1,
        weights: Literal["uniform", "samples"] = "uniform",
        aggregator: Aggregator | None = None,
    ) -> None:
        super().__init__(weights, aggregator)
        if not lam >= 0:
            raise UserError(f"method.lam is {lam}, and must be at least 0")
        self.lam = lam

    def init_client(self, client: Client) -> None:
        """A client also carries the global model."""
        client.networks["global"] = client.spec.build_model("private", "server")

    def receive(self, client: Client, received: StateDict, round_idx: int) -> dict[str, float]:
        """Load the global model, and train the personal one beside it."""
        client.networks["global"].load_state_dict(received)
        if round_idx == 0:
            return {}
        task, private = client.spec.task, client.networks["private"]
        objectives: list[LossTerm] = [SupervisedLoss(task)]
        if self.lam:
            objectives.append(ProximalPenalty(private, trainable(client.networks["global"]), self.lam))
        module = ObjectiveModule(private, objectives, task, client.spec.optimizer)
        logs = client.train("private", module, client.supervised_rounds + 1, carry_optimizer=True)
        client.supervised_epochs += client.spec.client.local_epochs
        return logs

    def prepare_update(self, client: Client, round_idx: int) -> Update:
        """Train the global model on the client's data, and send it."""
        network = client.networks["global"]
        module = SupervisedModule(network, client.spec.task, client.spec.optimizer)
        client.train("global", module, round_idx)
        return Update(client.number, dict(network.state_dict()), len(client.splits.train))

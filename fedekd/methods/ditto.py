"""Ditto (Li et al., ICML 2021)."""

from __future__ import annotations

from typing import Literal

from fedekd.functional import Aggregator
from fedekd.methods.base import Candidates, ClientUpdate, StateDict
from fedekd.methods.client import Client
from fedekd.methods.fedavg import FedAvg
from fedekd.models.freezing import load_exchanged
from fedekd.modules import LossTerm, ObjectiveModule, ProximalPenalty, SupervisedLoss, SupervisedModule
from fedekd.modules.losses import copy_parameters, require_nonnegative


class Ditto(FedAvg):
    r"""Ditto: FedAvg, and personal models regularised towards the global model.

    The personal model v minimises $L_k(v) + \frac{\lambda}{2} \|v - w\|^2$, with w the global model. Personal models
    have the initial weights and batches of the local baseline; with `lam` 0 they equal it, bit for bit.

    Args:
        lam: lambda, weight of the proximal term, at least 0.
        weights: `uniform`, or `samples` to weight clients by their training samples.
        aggregator: Another aggregator, by class_path; null is the mean with `weights`.

    Raises:
        UserError: If `lam` is negative.

    Reference:
        Li et al., Ditto: Fair and Robust Federated Learning Through Personalization, ICML 2021.
    """

    def __init__(
        self,
        lam: float = 0.1,
        weights: Literal["uniform", "samples"] = "uniform",
        aggregator: Aggregator | None = None,
    ) -> None:
        super().__init__(weights, aggregator)
        require_nonnegative("method.lam", lam)
        self.lam = lam

    def init_client(self, client: Client) -> None:
        """Add the global model to the client's networks."""
        client.networks["global"] = client.spec.build_model("private", "server")

    def candidates(self) -> Candidates:
        """Return the personal model, and the global model that was received."""
        return {**super().candidates(), "global": lambda client: client.single("global")}

    def receive(self, client: Client, received: StateDict, round_idx: int) -> dict[str, float]:
        """Load the global model, and train the personal one."""
        load_exchanged(client.networks["global"], received)
        if round_idx == 0:
            return {}
        task, private = client.spec.task, client.networks["private"]
        terms: list[LossTerm] = [SupervisedLoss(task)]
        if self.lam:
            terms.append(ProximalPenalty(private, copy_parameters(client.networks["global"]), self.lam))
        module = ObjectiveModule(private, terms, task, client.spec.optimizer)
        return client.train_supervised(module, carry_optimizer=True)

    def prepare_update(self, client: Client, round_idx: int) -> ClientUpdate:
        """Train the global model on the client's data, and return it."""
        network = client.networks["global"]
        client.train("global", SupervisedModule(network, client.spec.task, client.spec.optimizer), round_idx)
        return ClientUpdate.of(client, network)

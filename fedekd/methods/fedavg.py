"""FedAvg: one global model, trained by all (McMahan et al., AISTATS 2017)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import nn

from fedekd.errors import UserError
from fedekd.functional import Aggregator, Mean
from fedekd.methods.base import Broadcast, Method, StateDict, Update, is_uniform_mean
from fedekd.methods.client import Client
from fedekd.methods.specification import FederationSpec
from fedekd.modules import LossTerm, ObjectiveModule, SupervisedLoss, SupervisedModule


class FedAvg(Method):
    """Every client trains the global model on its own data, and the server averages what comes back.

    All start from one initialization, and the one global model is scored on every client's own test split.

    Args:
        weights: uniform counts every client alike (as the paper's grid does), samples by its training samples.
        aggregator: Another way to merge, by class_path: fedekd.functional.CoordinateMedian or TrimmedMean; null
            takes the mean with `weights`.
        finetune_epochs: After the last round each client trains the global model on its own for so many epochs.
    """

    def __init__(
        self,
        weights: Literal["uniform", "samples"] = "uniform",
        aggregator: Aggregator | None = None,
        finetune_epochs: int = 0,
    ) -> None:
        super().__init__()
        if finetune_epochs < 0:
            raise UserError(f"method.finetune_epochs is {finetune_epochs}, and must be at least 0")
        self.merge = aggregator if aggregator is not None else Mean(weights)
        self.finetune_epochs = finetune_epochs

    @property
    def supports_secure_mean(self) -> bool:
        """Whether models are merged by the uniform mean, and nothing else is done with them."""
        return type(self).aggregate is FedAvg.aggregate and is_uniform_mean(self.merge)

    def init_server(self, spec: FederationSpec) -> None:
        """One initial model for all."""
        spec.require_one_architecture(type(self).__name__)
        self.server_state = {"model": dict(spec.build_model("private", "server").state_dict())}

    def broadcast(self, participants: Sequence[int], round_idx: int) -> Broadcast:
        """The global model."""
        return Broadcast(self.server_state["model"])

    def receive(self, client: Client, received: StateDict, round_idx: int) -> dict[str, float]:
        """Load the global model; after the last round, make it the client's own."""
        network = client.networks["private"]
        network.load_state_dict(received)
        if round_idx < client.spec.rounds or not self.finetune_epochs:
            return {}
        module = SupervisedModule(network, client.spec.task, client.spec.optimizer)
        logs = client.train("private", module, round_idx, epochs=self.finetune_epochs)
        client.supervised_epochs += self.finetune_epochs
        return logs

    def objectives(self, client: Client, network: nn.Module, round_idx: int) -> list[LossTerm]:
        """What a client minimises in a round: L_k."""
        return [SupervisedLoss(client.spec.task)]

    def prepare_update(self, client: Client, round_idx: int) -> Update:
        """Train the global model on the client's data, and send it."""
        network = client.networks["private"]
        module = ObjectiveModule(
            network, self.objectives(client, network, round_idx), client.spec.task, client.spec.optimizer
        )
        client.train("private", module, round_idx)
        client.supervised_epochs += client.spec.client.local_epochs
        return Update(client.number, dict(network.state_dict()), len(client.splits.train))

    def aggregate(self, updates: Sequence[Update], round_idx: int) -> None:
        """The average of the clients' models."""
        states, sizes = [update.state for update in updates], [update.num_samples for update in updates]
        self.server_state = {"model": self.merge(states, sizes)}

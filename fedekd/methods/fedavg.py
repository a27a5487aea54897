"""FedAvg (McMahan et al., AISTATS 2017)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import nn

from fedekd.functional import Aggregator, Mean
from fedekd.methods.base import Broadcast, ClientUpdate, Method, StateDict, is_uniform_mean, require_finetuning
from fedekd.methods.client import Client, PhaseOptions
from fedekd.methods.specification import FederationSpec
from fedekd.models.freezing import exchanged_tensors, load_exchanged
from fedekd.modules import LossTerm, ObjectiveModule, SupervisedLoss, SupervisedModule


class FedAvg(Method):
    r"""FedAvg: clients train one global model, and the server averages its weights.

    $$\theta^{t+1} = \sum_k w_k \theta_k^t, \qquad \theta_k^t \approx \arg\min_\theta L_k(\theta)$$

    with $\theta_k^t$ trained from $\theta^t$ for `local_epochs`. The global model is scored on each client's test
    split. A variant that changes only the clients' loss overrides `loss_terms`.

    Args:
        weights: `uniform` gives every client weight 1/K (as in FedeKD's experiments); `samples` weights by the number
            of training samples.
        aggregator: Another aggregator, by class_path: fedekd.functional.CoordinateMedian or TrimmedMean; null is the
            mean with `weights`.
        finetune_epochs: Epochs of local training after the last round, at least 0. Local has no such epochs.
        finetune_lr_factor: Factor of the learning rate in these epochs, above 0.

    Raises:
        UserError: If `finetune_epochs` is negative, or `finetune_lr_factor` not above 0.

    Reference:
        McMahan et al., Communication-Efficient Learning of Deep Networks from Decentralized Data, AISTATS 2017.
    """

    exchanges_private = True

    def __init__(
        self,
        weights: Literal["uniform", "samples"] = "uniform",
        aggregator: Aggregator | None = None,
        finetune_epochs: int = 0,
        finetune_lr_factor: float = 1.0,
    ) -> None:
        super().__init__()
        require_finetuning(finetune_epochs, finetune_lr_factor)
        self.merge = aggregator if aggregator is not None else Mean(weights)
        self.finetune_epochs, self.finetune_lr_factor = finetune_epochs, finetune_lr_factor

    @property
    def supports_secure_mean(self) -> bool:
        """True if models are merged by the uniform mean."""
        return type(self).aggregate is FedAvg.aggregate and is_uniform_mean(self.merge)

    @property
    def serves_average(self) -> bool:
        """True without fine-tuning, unless a subclass serves another network."""
        return type(self).receive is FedAvg.receive and not self.finetune_epochs

    def init_server(self, spec: FederationSpec) -> None:
        """Build the initial global model."""
        spec.require_one_architecture(type(self).__name__)
        self.server_state = {"model": exchanged_tensors(spec.build_model("private", "server"))}

    def scheduled_epochs(self, spec: FederationSpec) -> int:
        """Add the epochs of fine-tuning."""
        return super().scheduled_epochs(spec) + self.finetune_epochs

    def broadcast(self, participants: Sequence[int], round_idx: int) -> Broadcast:
        """Return the global model."""
        return Broadcast(self.server_state["model"])

    def receive(self, client: Client, received: StateDict, round_idx: int) -> dict[str, float]:
        """Load the global model; after the last round, fine-tune it."""
        network = client.networks["private"]
        load_exchanged(network, received)
        if round_idx < client.spec.rounds or not self.finetune_epochs:
            return {}
        module = SupervisedModule(network, client.spec.task, client.spec.optimizer)
        options = PhaseOptions(epochs=self.finetune_epochs, lr_factor=self.finetune_lr_factor)
        return client.train_supervised(module, round_idx, is_counted=False, **options)

    def loss_terms(self, client: Client, network: nn.Module, round_idx: int) -> list[LossTerm]:
        """Return the terms of the client's loss in a round: L_k."""
        return [SupervisedLoss(client.spec.task)]

    def prepare_update(self, client: Client, round_idx: int) -> ClientUpdate:
        """Train the global model on the client's data, and return it."""
        network = client.networks["private"]
        terms = self.loss_terms(client, network, round_idx)
        client.train_supervised(ObjectiveModule(network, terms, client.spec.task, client.spec.optimizer), round_idx)
        return ClientUpdate.of(client, network)

    def aggregate(self, updates: Sequence[ClientUpdate], round_idx: int) -> None:
        """Average the clients' models."""
        states, sizes = [update.state for update in updates], [update.num_samples for update in updates]
        self.server_state = {"model": self.merge(states, sizes)}

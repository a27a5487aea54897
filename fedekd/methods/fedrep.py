"""FedRep (Collins et al., ICML 2021)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from torch import nn

from fedekd.errors import require
from fedekd.functional import Aggregator
from fedekd.methods.base import ClientUpdate
from fedekd.methods.client import Client
from fedekd.methods.fedper import FedPer, is_in_module
from fedekd.methods.specification import FederationSpec
from fedekd.modules import SupervisedModule


class FedRep(FedPer):
    """FedRep: FedPer that trains the head first, and then the representation.

    Args:
        head_epochs: Epochs of the head before the `client.local_epochs` of the representation, at least 1. They come
            on top, as in the paper, and do not count as supervised epochs: the local baseline trains all of its
            weights for as many epochs as the representation here. BatchNorm's running statistics are updated while the
            head is trained, as in the authors' code.
        personal: Names of the modules of the head; null as in FedPer.
        weights: `uniform`, or `samples` to weight clients by their training samples.
        aggregator: Another aggregator, by class_path; null is the mean with `weights`.
        finetune_epochs: Epochs of local training of head and representation together after the last round, at least 0.
            Local has no such epochs.
        finetune_lr_factor: Factor of the learning rate in these epochs, above 0.

    Raises:
        UserError: If `head_epochs` is below 1, `finetune_epochs` negative, or `finetune_lr_factor` not above 0.

    Reference:
        Collins et al., Exploiting Shared Representations for Personalized Federated Learning, ICML 2021, Algorithm 1.
    """

    def __init__(
        self,
        head_epochs: int = 1,
        personal: list[str] | None = None,
        weights: Literal["uniform", "samples"] = "uniform",
        aggregator: Aggregator | None = None,
        finetune_epochs: int = 0,
        finetune_lr_factor: float = 1.0,
    ) -> None:
        super().__init__(personal, weights, aggregator, finetune_epochs, finetune_lr_factor)
        require(head_epochs >= 1, "method.head_epochs", "at least 1", head_epochs)
        self.head_epochs = head_epochs

    def init_server(self, spec: FederationSpec) -> None:
        """Build the initial representation, and check that both parts are left to train."""
        super().init_server(spec)
        network = spec.build_model("private", "server")
        head = self.personal_modules(network.state_dict())
        require(len(head) > 0, "method.personal", "at least one module for FedRep", head, "Use FedAvg without a head.")
        trained = {
            any(is_in_module(name, module) for module in head)
            for name, parameter in network.named_parameters()
            if parameter.requires_grad
        }
        require(
            spec.client.freeze is None or len(trained) == 2,
            "client.freeze",
            "to leave parameters of head and representation to train, for method FedRep",
            spec.client.freeze,
        )

    def scheduled_epochs(self, spec: FederationSpec) -> int:
        """Return the most epochs of representation and head."""
        return max(super().scheduled_epochs(spec), spec.rounds * self.head_epochs)

    def prepare_update(self, client: Client, round_idx: int) -> ClientUpdate:
        """Train the head, then the representation, and return the representation."""
        network = client.networks["private"]
        head = self.personal_modules(network.state_dict())
        with _frozen(network, head, inside=False):
            module = SupervisedModule(network, client.spec.task, client.spec.optimizer)
            client.train("head", module, round_idx, epochs=self.head_epochs)
        with _frozen(network, head, inside=True):
            return super().prepare_update(client, round_idx)


@contextmanager
def _frozen(network: nn.Module, modules: list[str], inside: bool) -> Iterator[None]:
    """Context manager: freeze the parameters inside the named modules, or all others."""
    parameters = [
        parameter
        for name, parameter in network.named_parameters()
        if parameter.requires_grad and any(is_in_module(name, module) for module in modules) == inside
    ]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)

"""FedRep: a shared representation and a personal head, trained one after the other (Collins et al., ICML 2021)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from torch import nn

from fedekd.errors import UserError
from fedekd.functional import Aggregator
from fedekd.methods.base import Update
from fedekd.methods.client import Client
from fedekd.methods.fedper import FedPer, belongs
from fedekd.methods.specification import FederationSpec
from fedekd.modules import SupervisedModule


class FedRep(FedPer):
    """FedPer whose clients first fit their head to the representation they were sent, and then train that alone.

    Args:
        head_epochs: How many epochs the head is trained before the representation is for `client.local_epochs`; at
            least 1. They come on top, as in the paper, and are not counted as epochs of the private model: Local,
            which Delta is against, has as many of all its weights as the representation here.
            BatchNorm's running statistics go on with the head's training, as in the authors' code.
        personal: Names of the parts that are the head; null as for FedPer.
        weights: uniform counts every client alike, samples by its training samples.
        aggregator: Another way to merge, by class_path; null takes the mean with `weights`.
    """

    def __init__(
        self,
        head_epochs: int = 1,
        personal: list[str] | None = None,
        weights: Literal["uniform", "samples"] = "uniform",
        aggregator: Aggregator | None = None,
    ) -> None:
        super().__init__(personal, weights, aggregator)
        if head_epochs < 1:
            raise UserError(f"method.head_epochs is {head_epochs}, and must be at least 1")
        self.head_epochs = head_epochs

    def init_server(self, spec: FederationSpec) -> None:
        """One initial representation for all; there must be a head to train beside it."""
        super().init_server(spec)
        if not self.personal_parts(spec.build_model("private", "server").state_dict()):
            raise UserError("method.personal is [], which leaves FedRep no head to train; take FedAvg")

    def prepare_update(self, client: Client, round_idx: int) -> Update:
        """Train the head with the representation held, then the representation with the head held; send the latter."""
        network = client.networks["private"]
        head = self.personal_parts(network.state_dict())
        with _held(network, head, inside=False):
            module = SupervisedModule(network, client.spec.task, client.spec.optimizer)
            client.train("head", module, round_idx, epochs=self.head_epochs)
        with _held(network, head, inside=True):
            return super().prepare_update(client, round_idx)


@contextmanager
def _held(network: nn.Module, parts: list[str], inside: bool) -> Iterator[None]:
    """The weights inside named parts, or all others, get no gradient."""
    held = [
        parameter
        for name, parameter in network.named_parameters()
        if parameter.requires_grad and any(belongs(name, part) for part in parts) == inside
    ]
    for parameter in held:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in held:
            parameter.requires_grad_(True)

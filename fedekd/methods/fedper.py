"""FedPer: a shared base and a personal head (Arivazhagan et al. 2019)."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from fedekd.errors import UserError
from fedekd.functional import Aggregator
from fedekd.methods.base import StateDict, Update
from fedekd.methods.client import Client
from fedekd.methods.fedavg import FedAvg
from fedekd.methods.specification import FederationSpec


class FedPer(FedAvg):
    """FedAvg of everything but the last layers, which stay with their client.

    Args:
        personal: Names of the parts that stay; null takes `heads`, those of all exits, of a network that has exits,
            and otherwise `head`, as the models of fedekd.models call their last layer.
        weights: uniform counts every client alike, samples by its training samples.
        aggregator: Another way to merge, by class_path; null takes the mean with `weights`.
        finetune_epochs: After the last round each client trains its model on its own for so many epochs.
    """

    def __init__(
        self,
        personal: list[str] | None = None,
        weights: Literal["uniform", "samples"] = "uniform",
        aggregator: Aggregator | None = None,
        finetune_epochs: int = 0,
    ) -> None:
        super().__init__(weights, aggregator, finetune_epochs)
        self.personal = personal

    def init_server(self, spec: FederationSpec) -> None:
        """One initial base for all."""
        super().init_server(spec)
        model = self.server_state["model"]
        personal = self.personal_parts(model)
        for part in personal:
            if not any(belongs(name, part) for name in model):
                raise UserError(f"method.personal is {personal}, but client.private_model has no part {part!r}")
        self.server_state = {"model": self._base(model)}
        if not self.server_state["model"]:
            raise UserError(f"method.personal is {personal}, which leaves nothing to share")

    def personal_parts(self, state: StateDict) -> list[str]:
        """Names of the parts of a model that stay with their client."""
        if self.personal is not None:
            return self.personal
        return ["heads"] if any(belongs(name, "heads") for name in state) else ["head"]

    def _base(self, state: StateDict) -> dict[str, Tensor]:
        """What travels."""
        personal = self.personal_parts(state)
        return {name: value for name, value in state.items() if not any(belongs(name, part) for part in personal)}

    def receive(self, client: Client, received: StateDict, round_idx: int) -> dict[str, float]:
        """Load the base, and keep the head."""
        client.load_received(received)
        return super().receive(client, client.networks["private"].state_dict(), round_idx)

    def prepare_update(self, client: Client, round_idx: int) -> Update:
        """Train base and head together, and send the base."""
        update = super().prepare_update(client, round_idx)
        return Update(update.client, self._base(update.state), update.num_samples)


def belongs(name: str, part: str) -> bool:
    """Whether a tensor of a state dict lies in a part of the network."""
    return name == part or name.startswith(f"{part}.")

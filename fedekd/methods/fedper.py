"""FedPer (Arivazhagan et al., 2019)."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from fedekd.errors import require
from fedekd.functional import Aggregator
from fedekd.methods.base import ClientUpdate, StateDict
from fedekd.methods.client import Client
from fedekd.methods.fedavg import FedAvg
from fedekd.methods.specification import FederationSpec


class FedPer(FedAvg):
    """FedPer: FedAvg of the base of a network, with a personal head on each client.

    Args:
        personal: Names of the modules that stay on the client; null is `heads` (of all exits) for a network with
            exits, and otherwise `head`, the last layer of the models in fedekd.models.
        weights: `uniform`, or `samples` to weight clients by their training samples.
        aggregator: Another aggregator, by class_path; null is the mean with `weights`.
        finetune_epochs: Epochs of local training after the last round, at least 0. Local has no such epochs.
        finetune_lr_factor: Factor of the learning rate in these epochs, above 0.

    Raises:
        UserError: If `finetune_epochs` is negative, or `finetune_lr_factor` not above 0.

    Reference:
        Arivazhagan et al., Federated Learning with Personalization Layers, arXiv 1912.00818.
    """

    def __init__(
        self,
        personal: list[str] | None = None,
        weights: Literal["uniform", "samples"] = "uniform",
        aggregator: Aggregator | None = None,
        finetune_epochs: int = 0,
        finetune_lr_factor: float = 1.0,
    ) -> None:
        super().__init__(weights, aggregator, finetune_epochs, finetune_lr_factor)
        self.personal = personal

    def init_server(self, spec: FederationSpec) -> None:
        """Build the initial base."""
        super().init_server(spec)
        model = spec.build_model("private", "server").state_dict()
        personal = self.personal_modules(model)
        for module in personal:
            present = any(is_in_module(name, module) for name in model)
            require(present, "method.personal", "modules of client.private_model", module)
        require(len(self._base(model)) > 0, "method.personal", "to leave a shared part", personal)
        self.server_state = {"model": self._base(self.server_state["model"])}
        require(
            len(self.server_state["model"]) > 0,
            "client.freeze",
            f"to leave a shared part to train besides {', '.join(personal)}, for method {type(self).__name__}",
            spec.client.freeze,
        )

    def personal_modules(self, state: StateDict) -> list[str]:
        """Return the names of the modules that stay on the client."""
        if self.personal is not None:
            return self.personal
        return ["heads"] if any(is_in_module(name, "heads") for name in state) else ["head"]

    def _base(self, state: StateDict) -> dict[str, Tensor]:
        """Return the tensors that are exchanged."""
        personal = self.personal_modules(state)
        return {name: value for name, value in state.items() if not any(is_in_module(name, part) for part in personal)}

    def receive(self, client: Client, received: StateDict, round_idx: int) -> dict[str, float]:
        """Load the base, and keep the head."""
        client.load_received(received)
        return super().receive(client, client.networks["private"].state_dict(), round_idx)

    def prepare_update(self, client: Client, round_idx: int) -> ClientUpdate:
        """Train base and head together, and return the base."""
        return ClientUpdate.of(client, self._base(super().prepare_update(client, round_idx).state))


def is_in_module(name: str, module: str) -> bool:
    """Return True if a tensor of a state_dict belongs to a module of the network."""
    return name == module or name.startswith(f"{module}.")

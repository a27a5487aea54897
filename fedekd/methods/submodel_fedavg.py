"""FedAvg over clients with different parts of one model (DepthFL, ScaleFL)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn

from fedekd.errors import UserError, require
from fedekd.functional import average_submodels, submodel_state_dict
from fedekd.methods.base import Broadcast, ClientUpdate, StateDict
from fedekd.methods.client import Client
from fedekd.methods.fedavg import FedAvg
from fedekd.methods.specification import FederationSpec
from fedekd.models.freezing import exchanged_tensors, frozen_names
from fedekd.modules import LossTerm


class SubmodelFedAvg(FedAvg):
    r"""Base class of FedAvg over submodels: leading stages, channels, or both.

    `client.depths` assigns numbers of stages to the clients, `client.private_models` networks of different width, the
    widest first. A client receives, trains and returns its part. Every weight is averaged over the clients that hold
    it: $\theta_j = \sum_{k \in K_j} w_k \theta_{kj} / \sum_{k \in K_j} w_k$. The local baseline trains the same part.

    Args:
        weights: `uniform`, or `samples` to weight clients by their training samples.
    """

    exits = 3

    def __init__(self, weights: Literal["uniform", "samples"] = "uniform") -> None:
        super().__init__(weights)
        self.weights = weights

    def init_server(self, spec: FederationSpec) -> None:
        """Build the full model, and record the shapes of each client's part."""
        whole = spec.build_multi_exit_model(type(self).__name__)
        model, state = exchanged_tensors(whole), whole.state_dict()
        frozen = {name: state[name] for name in frozen_names(whole)}
        indices: dict[str, int] = {}
        shapes: list[dict[str, tuple[int, ...]]] = []
        part_indices = []
        for number in range(spec.num_clients):
            key = spec.architecture_key(number)
            if key not in indices:
                network = spec.build_model("private", number)
                _require_equal_frozen(network, frozen, number, spec)
                part = exchanged_tensors(network)
                indices[key] = len(shapes)
                shapes.append({name: tuple(tensor.shape) for name, tensor in part.items()})
                try:
                    submodel_state_dict(model, shapes[-1])
                except ValueError as error:
                    raise UserError(
                        f"client.private_models: expected submodels of the first model, got another model for client"
                        f" {number} ({error}). List the widest model first"
                    ) from error
            part_indices.append(indices[key])
        self.server_state = {"model": model, "shapes": shapes, "part_indices": part_indices}

    def broadcast(self, participants: Sequence[int], round_idx: int) -> Broadcast:
        """Return each client's part of the model."""
        state = self.server_state
        if len(state["shapes"]) == 1:
            return Broadcast(submodel_state_dict(state["model"], state["shapes"][0]))
        # Copies: pickling a view would send all of its storage.
        parts = [
            {name: tensor.clone() for name, tensor in submodel_state_dict(state["model"], shapes).items()}
            for shapes in state["shapes"]
        ]
        return Broadcast(personal={client: parts[state["part_indices"][client]] for client in participants})

    @abstractmethod
    def loss_terms(self, client: Client, network: nn.Module, round_idx: int) -> list[LossTerm]:
        """Return the terms of the client's loss in a round."""

    def aggregate(self, updates: Sequence[ClientUpdate], round_idx: int) -> None:
        """Average each weight over the clients that hold it."""
        weights = [1.0 if self.weights == "uniform" else float(update.num_samples) for update in updates]
        model = average_submodels(self.server_state["model"], [update.state for update in updates], weights)
        self.server_state = {**self.server_state, "model": model}


def _require_equal_frozen(network: nn.Module, frozen: StateDict, number: int, spec: FederationSpec) -> None:
    """Check that a client's frozen tensors equal those of the server.

    Raises:
        UserError: If they do not, as for networks of different width.
    """
    state = network.state_dict()
    different = [
        name for name in frozen_names(network) if not (name in frozen and torch.equal(state[name], frozen[name]))
    ]
    require(
        not different,
        "client.freeze" if spec.client.lora is None else "client.lora",
        "null for networks of different width, whose frozen parts differ",
        f"{min(different, default='')} of client {number}",
    )

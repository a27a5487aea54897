"""FedAvg over clients with different parts of one model (DepthFL, ScaleFL)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from fedekd.errors import UserError
from fedekd.functional import average_submodels, submodel_state_dict
from fedekd.methods.base import Broadcast, ClientUpdate
from fedekd.methods.fedavg import FedAvg
from fedekd.methods.specification import FederationSpec


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
        model = dict(spec.build_multi_exit_model(type(self).__name__).state_dict())
        indices: dict[str, int] = {}
        shapes: list[dict[str, tuple[int, ...]]] = []
        part_indices = []
        for number in range(spec.num_clients):
            key = spec.architecture_key(number)
            if key not in indices:
                part = spec.build_model("private", number).state_dict()
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

    def aggregate(self, updates: Sequence[ClientUpdate], round_idx: int) -> None:
        """Average each weight over the clients that hold it."""
        weights = [1.0 if self.weights == "uniform" else float(update.num_samples) for update in updates]
        model = average_submodels(self.server_state["model"], [update.state for update in updates], weights)
        self.server_state = {**self.server_state, "model": model}

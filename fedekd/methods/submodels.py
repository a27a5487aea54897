"""What DepthFL and ScaleFL share: clients of unlike capacity hold parts of one model, averaged part by part."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from fedekd.errors import UserError
from fedekd.functional import average_submodels, submodel_state_dict
from fedekd.methods.base import Broadcast, Update
from fedekd.methods.fedavg import FedAvg
from fedekd.methods.specification import FederationSpec


class NestedFedAvg(FedAvg):
    """FedAvg of a model with exits of which a client may hold a part: its first stages, its first channels, or both.

    Who holds what is said of the clients: `client.depths` deals out how many stages, and `client.private_models`
    networks of unlike width, the widest first. A client is sent what it holds,
    trains that, and sends it back; every weight is averaged over those who hold it. Local is trained on the same
    part.

    Args:
        weights: uniform counts every client alike, samples by its training samples.
    """

    exits = 3

    def __init__(self, weights: Literal["uniform", "samples"] = "uniform") -> None:
        super().__init__(weights)
        self.weights = weights

    def init_server(self, spec: FederationSpec) -> None:
        """The whole model, and the shapes of what each client holds of it."""
        model = dict(spec.require_exits(type(self).__name__).state_dict())
        kinds: dict[str, int] = {}
        shapes: list[dict[str, tuple[int, ...]]] = []
        held = []
        for number in range(spec.num_clients):
            kind = spec.architecture_key(number)
            if kind not in kinds:
                part = spec.build_model("private", number).state_dict()
                kinds[kind] = len(shapes)
                shapes.append({key: tuple(tensor.shape) for key, tensor in part.items()})
                try:
                    submodel_state_dict(model, shapes[-1])
                except ValueError as error:
                    raise UserError(
                        f"client.private_models: that of client {number} is no part of the first one ({error}); list"
                        " the widest first"
                    ) from error
            held.append(kinds[kind])
        self.server_state = {"model": model, "shapes": shapes, "held": held}

    def broadcast(self, participants: Sequence[int], round_idx: int) -> Broadcast:
        """To each client the part that it holds."""
        state = self.server_state
        if len(state["shapes"]) == 1:
            return Broadcast(submodel_state_dict(state["model"], state["shapes"][0]))
        # Copies: of a view all of its storage would travel to another process.
        parts = [
            {name: tensor.clone() for name, tensor in submodel_state_dict(state["model"], shapes).items()}
            for shapes in state["shapes"]
        ]
        return Broadcast(personal={client: parts[state["held"][client]] for client in participants})

    def aggregate(self, updates: Sequence[Update], round_idx: int) -> None:
        """Each weight's average over those who hold it."""
        weights = [1.0 if self.weights == "uniform" else float(update.num_samples) for update in updates]
        model = average_submodels(self.server_state["model"], [update.state for update in updates], weights)
        self.server_state = {**self.server_state, "model": model}

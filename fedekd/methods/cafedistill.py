"""CAFEDistill (arXiv 2601.10015)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Literal, cast, get_args

import torch
from torch import Tensor, nn

from fedekd.errors import UserError, require, require_choice
from fedekd.functional import Mean, active_exits, average_state_dicts, cosine_similarities, mixing_weights
from fedekd.functional.exit_scheduling import ORDERS, SCHEDULES, Order, Schedule
from fedekd.methods.base import Broadcast, ClientUpdate, Method, StateDict
from fedekd.methods.client import Client
from fedekd.methods.specification import FederationSpec
from fedekd.models import MultiExitNetwork
from fedekd.modules import LossTerm, ObjectiveModule, SelfDistillationLoss, SupervisedLoss
from fedekd.modules.losses import require_nonnegative, require_temperature

Conflict = Literal["head_update", "trunk_gradient"]
CONFLICTS: tuple[Conflict, ...] = get_args(Conflict)

#: Key in broadcasts and updates: which exits are trained, uint8, shape (m,).
ACTIVE = "active_exits"


class CAFEDistill(Method):
    r"""CAFEDistill: personalised early-exit networks with a shared trunk.

    The conflict between clients decides which exits are trained. In round t the server selects the exits that each
    participant trains (`active_exits`), and sends the trunk $\theta$, a mixed deepest head
    $\tilde h_i = \sum_j w_{ij} h_j$, and the selection. The client minimises

    $$L = \tfrac1m \sum_{e\,\text{active}} \mathrm{CE}_e + \lambda \sum_{e\,\text{active},\, e<m} T^2\,
    \mathrm{KL}(\mathrm{sg}\, p_m^T \,\|\, p_e^T)$$

    and returns trunk and deepest head; its shallow heads stay personal. The server averages the trunks and compares
    the updates of the heads, $\mathrm{Sim}_{ij} = \cos(\Delta h_i, \Delta h_j)$: clients with aligned updates get each
    other's heads (`mixing_weights`), and conflict delays the shallow exits.

    Linear heads on a shared trunk merge n teachers into one, $\sum_j w_{ij} h_j(\phi) = \tilde h_i(\phi)$, so the
    traffic per round equals FedAvg's. This is exact for averaged logits; their softmax is the geometric-mean teacher,
    not the mixture of the teachers' predictions.

    Points that the paper leaves open: among equally conflicting clients the lower number comes first. Similarities
    start at 0, and a pair that does not meet keeps its last value. A client's head is mixed from the heads of the
    round in which it took part, its own included, and is sent when it takes part again. A new client gets the uniform
    mixture of the last round's heads.

    Args:
        distillation_weight: lambda, at least 0.
        temperature: T, above 0.
        spread: a of the mixing weights, above 0; larger values give more uniform weights.
        order: `shallow_first`, or `deep_first` as a control.
        schedule: `progressive`, or `all_on` as a control: all exits are trained from the first round on.
        conflict: What is compared for the schedule and the mixing: `head_update`, or `trunk_gradient` as a control,
            the updates of the trunk's weights.
        weights: Average of the trunks: `samples` weights clients by their training samples, `uniform` equally.

    Raises:
        UserError: If a value is out of range.

    Reference:
        CAFEDistill, arXiv 2601.10015.
    """

    exits = 3

    def __init__(
        self,
        distillation_weight: float = 1.0,
        temperature: float = 2.0,
        spread: float = 0.6,
        order: Order = "shallow_first",
        schedule: Schedule = "progressive",
        conflict: Conflict = "head_update",
        weights: Literal["uniform", "samples"] = "samples",
    ) -> None:
        super().__init__()
        require(spread > 0, "method.spread", "a number above 0", spread)
        require_choice("method.order", order, ORDERS)
        require_choice("method.schedule", schedule, SCHEDULES)
        require_choice("method.conflict", conflict, CONFLICTS)
        require_nonnegative("method.distillation_weight", distillation_weight)
        require_temperature(temperature, "method.temperature")
        self.distillation_weight, self.temperature, self.spread = distillation_weight, temperature, spread
        self.order, self.schedule, self.conflict = order, schedule, conflict
        self.merge = Mean(weights)

    @property
    def serves_average(self) -> bool:
        """True: trunk and deepest head are averages over clients."""
        return True

    def init_server(self, spec: FederationSpec) -> None:
        """Build the initial trunk and deepest head; all similarities are 0."""
        spec.require_one_architecture("CAFEDistill")
        network = spec.build_multi_exit_model("CAFEDistill")
        _require_full_depth(network)
        trunk, head = _split(network.state_dict(), network.num_exits)
        count = spec.num_clients
        self.server_state = {
            "trunk": trunk,
            "default_head": head,
            "heads": {},
            "weights": [name for name, _ in network.named_parameters()],
            "similarities": torch.zeros(count, count, dtype=torch.float64),
            "exits": network.num_exits,
            "rounds": spec.rounds,
        }

    def broadcast(self, participants: Sequence[int], round_idx: int) -> Broadcast:
        """Return the trunk, and each participant's mixed head and active exits."""
        state = self.server_state
        active = torch.ones(len(participants), state["exits"], dtype=torch.bool)
        if round_idx < state["rounds"]:  # nothing is trained after the last aggregation
            indices = torch.tensor(participants)
            similarities = state["similarities"][indices][:, indices]
            active = active_exits(
                similarities, round_idx + 1, state["rounds"], state["exits"], self.order, self.schedule
            )
        personal = {
            client: {**self.mixed_head(client), ACTIVE: row.to(torch.uint8)}
            for client, row in zip(participants, active, strict=True)
        }
        return Broadcast(state["trunk"], personal)

    def mixed_head(self, client: int) -> StateDict:
        """Return a client's mixed head; the default head before its first round."""
        heads: Mapping[int, StateDict] = self.server_state["heads"]
        return heads[client] if client in heads else cast(StateDict, self.server_state["default_head"])

    def receive(self, client: Client, received: StateDict, round_idx: int) -> dict[str, float]:
        """Load trunk and mixed head; the shallow heads stay personal."""
        client.load_received({name: tensor for name, tensor in received.items() if name != ACTIVE})
        trained = client.method_state.get(ACTIVE, ())  # in the round whose result is scored now
        client.method_state[ACTIVE] = received[ACTIVE].cpu()
        return {f"exit_{number}/active": float(active) for number, active in enumerate(trained, start=1)}

    def prepare_update(self, client: Client, round_idx: int) -> ClientUpdate:
        """Train the active exits, and return trunk and deepest head."""
        network = cast(MultiExitNetwork, client.networks["private"])
        _require_full_depth(network)
        terms = self.loss_terms(client.method_state[ACTIVE])
        client.train_supervised(ObjectiveModule(network, terms, client.spec.task, client.spec.optimizer), round_idx)
        trunk, head = _split(network.state_dict(), network.num_exits)
        return ClientUpdate.of(client, {**trunk, **head, ACTIVE: client.method_state[ACTIVE]})

    def loss_terms(self, active: Tensor) -> list[LossTerm]:
        """Return the terms of the loss for the active exits.

        Args:
            active: Which exits are trained, shape (m,).
        """
        weights = [float(is_active) for is_active in active]
        terms: list[LossTerm] = [SupervisedLoss("classification", [weight / len(weights) for weight in weights])]
        if self.distillation_weight:
            terms.append(SelfDistillationLoss(self.distillation_weight, self.temperature, weights))
        return terms

    def aggregate(self, updates: Sequence[ClientUpdate], round_idx: int) -> None:
        """Average the trunks, update similarities, and mix each participant's head."""
        state = self.server_state
        clients = [update.client for update in updates]
        parts = [_split(update.state, state["exits"]) for update in updates]
        trunks, heads = [trunk for trunk, _ in parts], [head for _, head in parts]
        if self.conflict == "head_update":
            changes = [_change(head, self.mixed_head(number)) for head, number in zip(heads, clients, strict=True)]
        else:
            # Without buffers: BatchNorm's statistics are not gradients, and similar on all clients.
            names = [name for name in state["trunk"] if name in state["weights"]]
            changes = [_change({name: trunk[name] for name in names}, state["trunk"]) for trunk in trunks]
        similarities = state["similarities"].clone()
        indices = torch.tensor(clients)
        similarities[indices[:, None], indices] = cosine_similarities(torch.stack(changes)).cpu()
        mixed = [
            average_state_dicts(heads, weights.tolist())
            for weights in mixing_weights(similarities[indices][:, indices], self.spread)
        ]
        self.server_state = {
            **state,
            "trunk": self.merge(trunks, [update.num_samples for update in updates]),
            "default_head": average_state_dicts(heads),
            "heads": {**state["heads"], **dict(zip(clients, mixed, strict=True))},
            "similarities": similarities,
        }


def _require_full_depth(network: MultiExitNetwork) -> None:
    """Check that the last head is the network's linear layer, at full depth."""
    if not isinstance(network.heads[-1], nn.Linear):
        raise UserError("client.depths: expected null for method CAFEDistill, which mixes the network's last layer")


def _split(state: StateDict, exits: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return trunk and deepest head of a network with exits."""
    trunk = {name: tensor for name, tensor in state.items() if name.startswith("stages.")}
    head = {name: tensor for name, tensor in state.items() if re.match(rf"heads\.{exits - 1}\.", name)}
    return trunk, head


def _change(after: StateDict, before: StateDict) -> Tensor:
    """Return the difference of two states as one vector, in float64."""
    return torch.cat(
        [(after[name].double() - before[name].to(after[name].device).double()).flatten() for name in after]
    )

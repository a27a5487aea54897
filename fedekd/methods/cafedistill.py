"""CAFEDistill (arXiv 2601.10015): personalised early-exit networks, federated, with conflict-aware coordination."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Literal, cast, get_args

import torch
from torch import Tensor, nn

from fedekd.errors import UserError, nearest
from fedekd.functional import Mean, active_exits, average_state_dicts, cosine_similarities, mixing_weights
from fedekd.functional.exit_scheduling import ORDERS, SCHEDULES, Order, Schedule
from fedekd.methods.base import Broadcast, Method, StateDict, Update
from fedekd.methods.client import Client
from fedekd.methods.specification import FederationSpec
from fedekd.models import MultiExitNetwork
from fedekd.modules import LossTerm, ObjectiveModule, SelfDistillationLoss, SupervisedLoss
from fedekd.modules.losses.exits import require_at_least_0, require_temperature

Conflict = Literal["head_update", "trunk_gradient"]
CONFLICTS: tuple[Conflict, ...] = get_args(Conflict)

#: In a broadcast and an update: which exits learn, uint8, (m,).
ACTIVE = "active_exits"


class CAFEDistill(Method):
    r"""A shared trunk, personal heads, and a deepest head that is mixed for each client from those of its kind.

    In round t the server decides which exits of which participants learn (`active_exits`), and sends each the trunk
    $\theta$, a mixed deepest head $\tilde h_i = \sum_j w_{ij} h_j$, and that list. The client trains on

    $$L = \tfrac1m \sum_{e\,\text{active}} \mathrm{CE}_e + \lambda \sum_{e\,\text{active},\, e<m} T^2\,
    \mathrm{KL}(\mathrm{sg}\, p_m^T \,\|\, p_e^T)$$

    and sends trunk and deepest head back; its shallow heads stay with it. The server averages the trunks, and compares
    what the clients did to their heads, $\mathrm{Sim}_{ij} = \cos(\Delta h_i, \Delta h_j)$: clients that pull alike
    get each other's heads (`mixing_weights`), and conflict holds the shallow exits back.

    Linear heads on a shared trunk make n teachers one: $\sum_j w_{ij} h_j(\phi) = \tilde h_i(\phi)$, so a round's
    traffic is that of FedAvg. That is exact for averaged logits, and their softmax is the geometric-mean teacher, not
    the mixture of the teachers' predictions.

    Open points of the paper, as they are settled here: of equally conflicting clients the lower number comes first;
    similarities begin at 0, and of a pair that does not meet keep their last value; a client's head is mixed
    when it has taken part, of the heads of that round, its own among them, and waits for it until it takes part again;
    a client seen for the first time gets the uniform mix of the last round's.

    Args:
        distillation_weight: lambda, at least 0.
        temperature: T, above 0.
        spread: a of the mixing weights, above 0; the larger, the more alike they are.
        order: `shallow_first`, or `deep_first` as a control.
        schedule: `progressive`, or `all_on` as a control: all exits learn from the first round on.
        conflict: What is compared, for the schedule and for the mixing: `head_update`, or `trunk_gradient` as a
            control, what the clients did to the weights of the trunk.
        weights: How trunks are averaged: `samples` by training samples, `uniform` every client alike.
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
        if not spread > 0:
            raise UserError(f"method.spread is {spread}, and must be above 0")
        for name, value, known in (
            ("order", order, ORDERS),
            ("schedule", schedule, SCHEDULES),
            ("conflict", conflict, CONFLICTS),
        ):
            if value not in known:
                raise UserError(f"method.{name} is {value!r}, which is not known; {nearest(value, known)}")
        require_at_least_0(**{"method.distillation_weight": distillation_weight})
        require_temperature(temperature, "method.temperature")
        self.distillation_weight, self.temperature, self.spread = distillation_weight, temperature, spread
        self.order, self.schedule, self.conflict = order, schedule, conflict
        self.merge = Mean(weights)

    def init_server(self, spec: FederationSpec) -> None:
        """One initial trunk and deepest head for all; nobody has been compared."""
        spec.require_one_architecture("CAFEDistill")
        network = spec.require_exits("CAFEDistill")
        if not isinstance(network.heads[-1], nn.Linear):
            raise UserError("method CAFEDistill mixes the network's last layers, and client.depths cuts them off")
        trunk, head = _parts(network.state_dict(), network.num_exits)
        count = spec.num_clients
        self.server_state = {
            "trunk": trunk,
            "newcomers_head": head,
            "heads": {},
            "weights": [name for name, _ in network.named_parameters()],
            "similarities": torch.zeros(count, count, dtype=torch.float64),
            "exits": network.num_exits,
            "rounds": spec.rounds,
        }

    def broadcast(self, participants: Sequence[int], round_idx: int) -> Broadcast:
        """The trunk for all; for each its mixed head, and which of its exits learn."""
        state = self.server_state
        active = torch.ones(len(participants), state["exits"], dtype=torch.bool)
        if round_idx < state["rounds"]:  # after the last aggregation nobody learns
            chosen = torch.tensor(participants)
            among = state["similarities"][chosen][:, chosen]
            active = active_exits(among, round_idx + 1, state["rounds"], state["exits"], self.order, self.schedule)
        personal = {
            client: {**self.mixed_head(client), ACTIVE: active[place].to(torch.uint8)}
            for place, client in enumerate(participants)
        }
        return Broadcast(state["trunk"], personal)

    def mixed_head(self, client: int) -> StateDict:
        """The deepest head that a client is sent: mixed for it when it last took part, or for newcomers."""
        heads: Mapping[int, StateDict] = self.server_state["heads"]
        return heads[client] if client in heads else cast(StateDict, self.server_state["newcomers_head"])

    def receive(self, client: Client, received: StateDict, round_idx: int) -> dict[str, float]:
        """Load trunk and mixed head; the shallow heads are the client's own."""
        client.load_received({name: tensor for name, tensor in received.items() if name != ACTIVE})
        learned = client.method_state.get(ACTIVE, ())  # in the training that led to what is scored now
        client.method_state[ACTIVE] = received[ACTIVE].cpu()
        return {f"exit_{number}/active": float(learns) for number, learns in enumerate(learned, start=1)}

    def prepare_update(self, client: Client, round_idx: int) -> Update:
        """Train the active exits, and send trunk and deepest head."""
        network = cast(MultiExitNetwork, client.networks["private"])
        module = ObjectiveModule(
            network, self.objectives(client.method_state[ACTIVE]), client.spec.task, client.spec.optimizer
        )
        client.train("private", module, round_idx)
        client.supervised_epochs += client.spec.client.local_epochs
        if not isinstance(network.heads[-1], nn.Linear):
            raise UserError("method CAFEDistill mixes the network's last layers, and client.depths cuts them off")
        trunk, head = _parts(network.state_dict(), network.num_exits)
        return Update(client.number, {**trunk, **head, ACTIVE: client.method_state[ACTIVE]}, len(client.splits.train))

    def objectives(self, active: Tensor) -> list[LossTerm]:
        """The terms of the loss, for the exits that learn.

        Args:
            active: Which, (m,).
        """
        learns = [float(each) for each in active]
        found: list[LossTerm] = [SupervisedLoss("classification", [each / len(learns) for each in learns])]
        if self.distillation_weight:
            found.append(SelfDistillationLoss(self.distillation_weight, self.temperature, learns))
        return found

    def aggregate(self, updates: Sequence[Update], round_idx: int) -> None:
        """Average the trunks, compare what was done to the heads, and mix them for each of their clients."""
        state = self.server_state
        clients = [update.client for update in updates]
        parts = [_parts(update.state, state["exits"]) for update in updates]
        trunks, heads = [trunk for trunk, _ in parts], [head for _, head in parts]
        if self.conflict == "head_update":
            changes = [_change(head, self.mixed_head(number)) for head, number in zip(heads, clients, strict=True)]
        else:
            # Without buffers: what BatchNorm has counted and averaged is no gradient, and much alike everywhere.
            names = [name for name in state["trunk"] if name in state["weights"]]
            changes = [_change({name: trunk[name] for name in names}, state["trunk"]) for trunk in trunks]
        similarities = state["similarities"].clone()
        chosen = torch.tensor(clients)
        similarities[chosen[:, None], chosen] = cosine_similarities(torch.stack(changes)).cpu()
        mixed = [
            average_state_dicts(heads, weights.tolist())
            for weights in mixing_weights(similarities[chosen][:, chosen], self.spread)
        ]
        self.server_state = {
            **state,
            "trunk": self.merge(trunks, [update.num_samples for update in updates]),
            "newcomers_head": average_state_dicts(heads),
            "heads": {**state["heads"], **dict(zip(clients, mixed, strict=True))},
            "similarities": similarities,
        }


def _parts(state: StateDict, exits: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Trunk and deepest head of a network with exits; what else a state holds is left out."""
    trunk = {name: tensor for name, tensor in state.items() if name.startswith("stages.")}
    head = {name: tensor for name, tensor in state.items() if re.match(rf"heads\.{exits - 1}\.", name)}
    return trunk, head


def _change(now: StateDict, before: StateDict) -> Tensor:
    """What was added to a state, as one vector."""
    return torch.cat([(now[name].double() - before[name].to(now[name].device).double()).flatten() for name in now])

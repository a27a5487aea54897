"""CAFEDistill (arXiv 2601.10015)."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, Unpack, cast, get_args

import torch
from torch import Tensor, nn

from fedekd.errors import UserError, require, require_choice
from fedekd.functional import Mean, active_exits, average_state_dicts, cosine_similarities, mixing_weights
from fedekd.functional.exit_scheduling import ORDERS, SCHEDULES, Order, Schedule
from fedekd.functional.label_prior import SERVING_SMOOTHING, TRAINING_SMOOTHING
from fedekd.methods.base import Broadcast, ClientUpdate, Method, StateDict, is_uniform_mean, require_finetuning
from fedekd.methods.client import Client, PhaseOptions
from fedekd.methods.serving import Serving
from fedekd.methods.specification import FederationSpec
from fedekd.models import MultiExitNetwork
from fedekd.models.freezing import exchanged_tensors
from fedekd.modules import LossTerm, ObjectiveModule, SelfDistillationLoss, SupervisedLoss
from fedekd.modules.losses import require_nonnegative, require_temperature

Variant = Literal["paper", "corrected"]
Heads = Literal["mixed", "personal", "shared"]
TeacherHead = Literal["own", "received"]
Reduction = Literal["mean", "sum"]
Conflict = Literal["head_update", "trunk_gradient"]
CONFLICTS: tuple[Conflict, ...] = get_args(Conflict)

#: Key in broadcasts and updates: which exits are trained, uint8, shape (m,).
ACTIVE = "active_exits"

#: Key in a client's state: the received last head, which teaches.
_TEACHER = "teacher_head"


class VariantDefaults(NamedTuple):
    """Defaults of the options that differ between the variants."""

    heads: Heads
    teacher_head: TeacherHead
    distillation_weight: float
    reduction: Reduction
    schedule: Schedule
    finetune_epochs: int


VARIANTS: dict[Variant, VariantDefaults] = {
    "paper": VariantDefaults("mixed", "own", 1.0, "mean", "progressive", 0),
    "corrected": VariantDefaults("shared", "received", 0.1, "sum", "all_on", 4),
}


class CAFEDistill(Method):
    r"""CAFEDistill: personalised early-exit networks with a shared trunk.

    In round t the server selects the exits that each participant trains (`active_exits`), and sends the trunk
    $\theta$, a mixed deepest head $\tilde h_i = \sum_j w_{ij} h_j$, and the selection. The client minimises

    $$L = s \sum_{e\,\text{active}} \mathrm{CE}_e + \lambda \sum_{e\,\text{active},\, e<m} T^2\,
    \mathrm{KL}(\mathrm{sg}\, q^T \,\|\, p_e^T)$$

    and returns trunk and deepest head. The server averages the trunks and compares the updates of the heads,
    $\mathrm{Sim}_{ij} = \cos(\Delta h_i, \Delta h_j)$: clients with aligned updates get each other's heads
    (`mixing_weights`), and conflict delays the shallow exits.

    `variant` selects the defaults of the options that follow it:

    | option | `paper` | `corrected` |
    | --- | --- | --- |
    | `heads` | `mixed`: the client answers with the mixed head and trains it; shallow heads are personal | `shared` |
    | `teacher_head` of q | `own`: the deepest exit | `received`: the received last head on the live features |
    | `distillation_weight` $\lambda$ | 1 | 0.1 |
    | `reduction` | `mean`: s = 1 / m | `sum`: s = 1 |
    | `schedule` | `progressive` | `all_on` |
    | `finetune_epochs` | 0 | 4 |

    With `shared` heads all exits are averaged like the trunk. They are trained with the client's label prior,
    $\mathrm{CE}(\mathrm{softmax}(z_e + \log \pi_i), y)$, so that clients with different classes agree on them, and
    served with it: the prior personalises the exits. Without the progressive schedule no updates are compared then, so
    that secure aggregation can hide each one. `personal` heads stay on the client; the mixed head then only teaches,
    and $\Delta h_i$ is the difference of the personal from the received head.

    Linear heads on a shared trunk merge n teachers into one, $\sum_j w_{ij} h_j(\phi) = \tilde h_i(\phi)$, so the
    traffic per round equals FedAvg's. This is exact for averaged logits; their softmax is the geometric-mean teacher,
    not the mixture of the teachers' predictions.

    Points that the paper leaves open: among equally conflicting clients the lower number comes first. Similarities
    start at 0, and a pair that does not meet keeps its last value. A client's head is mixed from the heads of the
    round in which it took part, its own included, and is sent when it takes part again. A new client gets the uniform
    mixture of the last round's heads, and also starts from it if its head is personal.

    Args:
        variant: `paper` as published, or `corrected` with the changes in the table.
        distillation_weight: lambda, at least 0; null as in the table.
        temperature: T, above 0.
        spread: a of the mixing weights, above 0; larger values give more uniform weights. Without
            effect with `shared` heads.
        order: `shallow_first`, or `deep_first` as a control, of the progressive schedule.
        schedule: `progressive`, or `all_on`: all exits are trained from the first round on; null as in the table.
        conflict: What is compared for the schedule and the mixing: `head_update`, or `trunk_gradient` as a control,
            the updates of the trunk's weights.
        weights: Average of the trunks: `samples` weights clients by their training samples, `uniform` equally.
        heads: `mixed`, `personal` or `shared`; null as in the table.
        teacher_head: `own` or `received`; null as in the table. The received head is frozen. Without effect if
            `distillation_weight` is 0.
        reduction: `mean` or `sum` of the cross-entropies over all exits; null as in the table.
        label_prior: Train and serve all exits with the client's label prior; null does with `shared` heads.
        finetune_epochs: Epochs of local training of all exits, with the loss above, after the last round, at least 0;
            null as in the table. Local has no such epochs.
        finetune_lr_factor: Factor of the learning rate in these epochs, above 0.

    Raises:
        UserError: If a value is out of range.

    Reference:
        CAFEDistill, arXiv 2601.10015. The prior: Balanced softmax, Ren et al., NeurIPS 2020, arXiv 2007.10740.
    """

    exits = 3

    exchanges_private = True

    def __init__(
        self,
        variant: Variant = "corrected",
        distillation_weight: float | None = None,
        temperature: float = 2.0,
        spread: float = 0.6,
        order: Order = "shallow_first",
        schedule: Schedule | None = None,
        conflict: Conflict = "head_update",
        weights: Literal["uniform", "samples"] = "samples",
        heads: Heads | None = None,
        teacher_head: TeacherHead | None = None,
        reduction: Reduction | None = None,
        label_prior: bool | None = None,
        finetune_epochs: int | None = None,
        finetune_lr_factor: float = 0.1,
    ) -> None:
        super().__init__()
        require_choice("method.variant", variant, VARIANTS)
        defaults = VARIANTS[variant]
        self.heads = defaults.heads if heads is None else heads
        self.teacher_head = defaults.teacher_head if teacher_head is None else teacher_head
        self.reduction = defaults.reduction if reduction is None else reduction
        self.schedule = defaults.schedule if schedule is None else schedule
        self.distillation_weight = defaults.distillation_weight if distillation_weight is None else distillation_weight
        self.label_prior = self.heads == "shared" if label_prior is None else label_prior
        self.finetune_epochs = defaults.finetune_epochs if finetune_epochs is None else finetune_epochs
        require(spread > 0, "method.spread", "a number above 0", spread)
        require_finetuning(self.finetune_epochs, finetune_lr_factor)
        for option, value, allowed in (
            ("order", order, ORDERS),
            ("schedule", self.schedule, SCHEDULES),
            ("conflict", conflict, CONFLICTS),
            ("heads", self.heads, get_args(Heads)),
            ("teacher_head", self.teacher_head, get_args(TeacherHead)),
            ("reduction", self.reduction, get_args(Reduction)),
        ):
            require_choice(f"method.{option}", value, allowed)
        require_nonnegative("method.distillation_weight", self.distillation_weight)
        require_temperature(temperature, "method.temperature")
        self.temperature, self.spread, self.order, self.conflict = temperature, spread, order, conflict
        self.finetune_lr_factor = finetune_lr_factor
        self.merge = Mean(weights)

    @property
    def serves_average(self) -> bool:
        """True if the deepest exit is an average without prior and fine-tuning."""
        return self.heads != "personal" and not self.label_prior and not self.finetune_epochs

    @property
    def supports_secure_mean(self) -> bool:
        """True if all is merged by the uniform mean, and no updates are compared."""
        return not self._compares_updates and is_uniform_mean(self.merge)

    @property
    def _compares_updates(self) -> bool:
        return self.heads != "shared" or self.schedule != "all_on"

    def scheduled_epochs(self, spec: FederationSpec) -> int:
        """Add the epochs of fine-tuning."""
        return super().scheduled_epochs(spec) + self.finetune_epochs

    def init_server(self, spec: FederationSpec) -> None:
        """Build the initial trunk and deepest head; all similarities are 0."""
        spec.require_one_architecture("CAFEDistill")
        network = spec.build_multi_exit_model("CAFEDistill")
        _require_full_depth(network)
        trunk, head = self._split(exchanged_tensors(network), network.num_exits)
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
        """Return what is shared, and each participant's mixed head and active exits."""
        state = self.server_state
        if not self._compares_updates:
            return Broadcast(state["trunk"])
        active = torch.ones(len(participants), state["exits"], dtype=torch.bool)
        if round_idx < state["rounds"]:  # nothing is trained after the last aggregation
            indices = torch.tensor(participants)
            similarities = state["similarities"][indices][:, indices]
            active = active_exits(
                similarities, round_idx + 1, state["rounds"], state["exits"], self.order, self.schedule
            )
        personal = {
            client: {**({} if self.heads == "shared" else self.mixed_head(client)), ACTIVE: row.to(torch.uint8)}
            for client, row in zip(participants, active, strict=True)
        }
        return Broadcast(state["trunk"], personal)

    def mixed_head(self, client: int) -> StateDict:
        """Return a client's mixed head; the default head before its first round."""
        heads: Mapping[int, StateDict] = self.server_state["heads"]
        return heads[client] if client in heads else cast(StateDict, self.server_state["default_head"])

    def receive(self, client: Client, received: StateDict, round_idx: int) -> dict[str, float]:
        """Load the message of the server; after the last round, fine-tune."""
        state, last = client.method_state, _last_head(received, _num_exits(client))
        keeps_head = self.heads == "personal" and client.supervised_epochs > 0
        client.load_received(
            {name: tensor for name, tensor in received.items() if name != ACTIVE and not (keeps_head and name in last)}
        )
        if self._uses_received_head:
            state[_TEACHER] = {name.rpartition(".")[2]: tensor.clone() for name, tensor in last.items()}
        if self.label_prior:
            offsets = client.log_label_prior(SERVING_SMOOTHING).cpu()[None]
            client.serving = Serving(("private",), torch.ones(1, dtype=offsets.dtype), offsets)
        logs: dict[str, float] = {}
        if ACTIVE in received:
            trained = state.get(ACTIVE, ())  # in the round whose result is scored now
            state[ACTIVE] = received[ACTIVE].cpu()
            logs = {f"exit_{number}/active": float(active) for number, active in enumerate(trained, start=1)}
        if round_idx == client.spec.rounds and self.finetune_epochs:
            options = PhaseOptions(epochs=self.finetune_epochs, lr_factor=self.finetune_lr_factor)
            logs |= self._train(client, round_idx, is_counted=False, **options)
        return logs

    @property
    def _uses_received_head(self) -> bool:
        return self.teacher_head == "received" and self.distillation_weight > 0

    def prepare_update(self, client: Client, round_idx: int) -> ClientUpdate:
        """Train the active exits, and return what is shared and the deepest head."""
        network = cast(MultiExitNetwork, client.networks["private"])
        _require_full_depth(network)
        self._train(client, round_idx)
        trunk, head = self._split(exchanged_tensors(network), network.num_exits)
        active = {ACTIVE: client.method_state[ACTIVE]} if self._compares_updates else {}
        return ClientUpdate.of(client, {**trunk, **head, **active})

    def _train(
        self, client: Client, round_idx: int, is_counted: bool = True, **options: Unpack[PhaseOptions]
    ) -> dict[str, float]:
        network = cast(MultiExitNetwork, client.networks["private"])
        module = ObjectiveModule(
            network,
            self.loss_terms(client, network),
            client.spec.task,
            client.spec.optimizer,
            with_features=self._uses_received_head,
        )
        return client.train_supervised(module, round_idx, is_counted=is_counted, **options)

    def loss_terms(self, client: Client, network: MultiExitNetwork) -> list[LossTerm]:
        """Return the terms of the loss for the client's active exits."""
        weights = [float(is_active) for is_active in client.method_state.get(ACTIVE, [True] * network.num_exits)]
        scale = 1 / len(weights) if self.reduction == "mean" else 1.0
        offset = client.log_label_prior(TRAINING_SMOOTHING) if self.label_prior else None
        terms: list[LossTerm] = [SupervisedLoss("classification", [weight * scale for weight in weights], offset)]
        if not self.distillation_weight:
            return terms
        head: nn.Linear | None = None
        if self._uses_received_head:
            head = copy.deepcopy(network.head).requires_grad_(False)
            # The head was received without frozen tensors.
            head.load_state_dict({**head.state_dict(), **client.method_state[_TEACHER]})
        terms.append(SelfDistillationLoss(self.distillation_weight, self.temperature, weights, head, offset))
        return terms

    def aggregate(self, updates: Sequence[ClientUpdate], round_idx: int) -> None:
        """Average what is shared, update similarities, and mix each participant's head."""
        state = self.server_state
        clients = [update.client for update in updates]
        parts = [self._split(update.state, state["exits"]) for update in updates]
        trunks, heads = [trunk for trunk, _ in parts], [head for _, head in parts]
        changed: dict[str, Any] = {"trunk": self.merge(trunks, [update.num_samples for update in updates])}
        if self._compares_updates:
            if self.heads == "shared":
                heads = [_last_head(trunk, state["exits"]) for trunk in trunks]
            changed["similarities"] = self._similarities(clients, heads, trunks)
            changed |= self._mix(clients, heads, changed["similarities"])
        self.server_state = {**state, **changed}

    def _similarities(
        self, clients: list[int], heads: list[dict[str, Tensor]], trunks: list[dict[str, Tensor]]
    ) -> Tensor:
        """Return the similarities of all clients after a round, shape (K, K)."""
        state = self.server_state
        if self.conflict == "head_update":
            changes = [_change(head, self._received_head(number)) for head, number in zip(heads, clients, strict=True)]
        else:
            # Without buffers: BatchNorm's statistics are not gradients, and similar on all clients.
            names = [name for name in state["trunk"] if name in state["weights"]]
            changes = [_change({name: trunk[name] for name in names}, state["trunk"]) for trunk in trunks]
        similarities: Tensor = state["similarities"].clone()
        indices = torch.tensor(clients)
        similarities[indices[:, None], indices] = cosine_similarities(torch.stack(changes)).cpu()
        return similarities

    def _received_head(self, client: int) -> StateDict:
        """Return the head that a client received at the beginning of the round."""
        if self.heads == "shared":
            return _last_head(self.server_state["trunk"], self.server_state["exits"])
        return self.mixed_head(client)

    def _mix(self, clients: list[int], heads: list[dict[str, Tensor]], similarities: Tensor) -> dict[str, Any]:
        """Return the part of the state with the heads of a round."""
        if self.heads == "shared":
            return {}
        state, indices = self.server_state, torch.tensor(clients)
        mixed = [
            average_state_dicts(heads, weights.tolist())
            for weights in mixing_weights(similarities[indices][:, indices], self.spread)
        ]
        return {
            "default_head": average_state_dicts(heads),
            "heads": {**state["heads"], **dict(zip(clients, mixed, strict=True))},
        }

    def _split(self, state: StateDict, exits: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return what is averaged over clients, and the deepest head if it is not."""
        trunk = {name: tensor for name, tensor in state.items() if name.startswith("stages.")}
        if self.heads == "shared":
            return trunk | {name: tensor for name, tensor in state.items() if name.startswith("heads.")}, {}
        return trunk, _last_head(state, exits)


def _require_full_depth(network: MultiExitNetwork) -> None:
    """Check that the last head is the network's linear layer, at full depth."""
    if not isinstance(network.heads[-1], nn.Linear):
        raise UserError("client.depths: expected null for method CAFEDistill, which mixes the network's last layer")


def _num_exits(client: Client) -> int:
    return cast(MultiExitNetwork, client.networks["private"]).num_exits


def _last_head(state: StateDict, exits: int) -> dict[str, Tensor]:
    """Return the tensors of the deepest head."""
    return {name: tensor for name, tensor in state.items() if name.startswith(f"heads.{exits - 1}.")}


def _change(after: StateDict, before: StateDict) -> Tensor:
    """Return the difference of two states as one vector, in float64."""
    changes = [(after[name].double() - before[name].to(after[name].device).double()).flatten() for name in after]
    return torch.cat(changes) if changes else torch.zeros(0, dtype=torch.float64)  # all are frozen

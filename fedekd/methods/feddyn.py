"""FedDyn (Acar et al., ICLR 2021)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fedekd.errors import require
from fedekd.functional import all_finite, average_state_dicts
from fedekd.methods.base import ClientUpdate, StateDict
from fedekd.methods.client import Client
from fedekd.methods.fedavg import FedAvg
from fedekd.methods.specification import FederationSpec
from fedekd.modules import LinearPenalty, LossTerm, ProximalPenalty
from fedekd.modules.losses import copy_parameters


class FedDyn(FedAvg):
    r"""FedDyn: a dynamic regulariser aligns local and global stationary points.

    From $\theta^t$ client k minimises
    $L_k(\theta) - \langle g_k, \theta \rangle + \frac{\alpha}{2} \|\theta - \theta^t\|^2$ and sets
    $g_k \leftarrow g_k - \alpha (\theta_k - \theta^t)$. The server sets
    $h \leftarrow h - \frac{\alpha}{m} \sum_{k \in P} (\theta_k - \theta^t)$ and
    $\theta^{t+1} = \frac{1}{|P|} \sum_{k \in P} \theta_k - h / \alpha$, with m the number of all clients and P the
    participants. So h is the mean of all $g_k$ after every round, unless an update is lost. Buffers, such as the
    statistics of BatchNorm, have no gradient and are averaged separately.

    Args:
        alpha: Weight of the regulariser, above 0.
        finetune_epochs: Epochs of local training after the last round, at least 0. Local has no such epochs.
        finetune_lr_factor: Factor of the learning rate in these epochs, above 0.

    Raises:
        UserError: If a value is out of range.

    Reference:
        Acar et al., Federated Learning Based on Dynamic Regularization, ICLR 2021, Algorithm 1.
    """

    def __init__(self, alpha: float = 0.01, finetune_epochs: int = 0, finetune_lr_factor: float = 1.0) -> None:
        super().__init__(finetune_epochs=finetune_epochs, finetune_lr_factor=finetune_lr_factor)
        require(0 < alpha < math.inf, "method.alpha", "a finite number above 0", alpha, "FedDyn divides by alpha.")
        self.alpha = alpha

    @property
    def supports_secure_mean(self) -> bool:
        """True: h uses the sum of the drifts, and the model their mean."""
        return True

    def init_server(self, spec: FederationSpec) -> None:
        """Build the initial global model, and h = 0."""
        super().init_server(spec)
        self.num_clients = spec.num_clients
        parameters, model = copy_parameters(spec.build_model("private", "server")), self.server_state["model"]
        self.server_state["h"] = {name: torch.zeros_like(parameters[name]) for name in parameters if name in model}

    def restrict_to_one_client(self) -> None:
        """Divide the drift by one client."""
        self.num_clients = 1

    def loss_terms(self, client: Client, network: nn.Module, round_idx: int) -> list[LossTerm]:
        """Return L_k, the linear and the quadratic term."""
        anchor = copy_parameters(network)
        if "g" not in client.method_state:
            client.method_state["g"] = {name: torch.zeros_like(value) for name, value in anchor.items()}
        return [
            *super().loss_terms(client, network, round_idx),
            LinearPenalty(network, client.method_state["g"]),
            ProximalPenalty(network, anchor, self.alpha),
        ]

    def prepare_update(self, client: Client, round_idx: int) -> ClientUpdate:
        """Train, update g_k, and return the model.

        Diverged training leaves g_k unchanged; otherwise the client would diverge in every later round.
        """
        before = copy_parameters(client.networks["private"])
        update = super().prepare_update(client, round_idx)
        gradients: dict[str, Tensor] = client.method_state["g"]
        updated = {
            name: gradients[name].to(value.device) - self.alpha * (update.state[name] - value)
            for name, value in before.items()
            if name in update.state  # not frozen
        }
        if all_finite(updated.values()):
            client.method_state["g"] = gradients | updated
        return update

    def aggregate(self, updates: Sequence[ClientUpdate], round_idx: int) -> None:
        """Update h and the global model."""
        states = [update.state for update in updates]
        model: StateDict = self.server_state["model"]
        merged: dict[str, Any] = average_state_dicts(states)
        h: dict[str, Tensor] = {}
        for name, value in self.server_state["h"].items():
            # In float64: the drifts theta_k - theta^t are small, and h is divided by a small alpha. On the device of
            # the updates: a restored server state is on the CPU, whose sums round differently from a GPU's.
            mean = merged[name].double()
            before = model[name].to(mean)
            drifts = [state[name].to(before) - before for state in states]
            updated = value.to(before) - self.alpha / self.num_clients * torch.stack(drifts).sum(0)
            h[name] = updated.to(value.dtype)
            merged[name] = (mean - updated / self.alpha).to(merged[name].dtype)
        self.server_state = {"model": merged, "h": h}

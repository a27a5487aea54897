"""FedDyn: federated learning with dynamic regularization (Acar et al., ICLR 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fedekd.errors import UserError
from fedekd.functional import average_state_dicts
from fedekd.methods.base import StateDict, Update
from fedekd.methods.client import Client
from fedekd.methods.fedavg import FedAvg
from fedekd.methods.specification import FederationSpec
from fedekd.modules import LossTerm
from fedekd.modules.losses.regularizers import Linear, ProximalPenalty, trainable


class FedDyn(FedAvg):
    r"""Each client's loss is bent so that all clients' stationary points meet at the global one.

    A client k minimises $L_k(\theta) - \langle g_k, \theta \rangle + \frac{\alpha}{2} \|\theta - \theta^t\|^2$ from
    theta^t and then sets $g_k \leftarrow g_k - \alpha (\theta_k - \theta^t)$; the server sets
    $h \leftarrow h - \frac{\alpha}{m} \sum_{k \in P} (\theta_k - \theta^t)$ and
    $\theta^{t+1} = \frac{1}{|P|} \sum_{k \in P} \theta_k - h / \alpha$, with m all clients and P those that took
    part. So h is the mean of all g_k after every round (unless an update is lost on its way). Buffers, such as
    BatchNorm's statistics, have no gradient and are averaged apart.

    Args:
        alpha: Weight of the regularization, above 0.
        finetune_epochs: After the last round each client trains the global model on its own for so many epochs.
    """

    def __init__(self, alpha: float = 0.01, finetune_epochs: int = 0) -> None:
        super().__init__(finetune_epochs=finetune_epochs)
        if not alpha > 0:
            raise UserError(f"method.alpha is {alpha}, and must be above 0: FedDyn divides by it")
        self.alpha = alpha

    def init_server(self, spec: FederationSpec) -> None:
        """One initial model for all, and h = 0."""
        super().init_server(spec)
        self.num_clients = spec.num_clients
        parameters = trainable(spec.build_model("private", "server"))
        self.server_state["h"] = {name: torch.zeros_like(value) for name, value in parameters.items()}

    def objectives(self, client: Client, network: nn.Module, round_idx: int) -> list[LossTerm]:
        """L_k, the linear term and the quadratic one."""
        anchor = trainable(network)
        if "g" not in client.method_state:
            client.method_state["g"] = {name: torch.zeros_like(value) for name, value in anchor.items()}
        quadratic = ProximalPenalty(network, anchor, self.alpha)
        return [*super().objectives(client, network, round_idx), Linear(network, client.method_state["g"]), quadratic]

    def prepare_update(self, client: Client, round_idx: int) -> Update:
        """Train, renew g_k, and send the model.

        g_k lasts: training that has diverged leaves it as it was, or the client would diverge in every later round.
        """
        before = trainable(client.networks["private"])
        update = super().prepare_update(client, round_idx)
        gradients: dict[str, Tensor] = client.method_state["g"]
        renewed = {
            name: gradients[name].to(value.device) - self.alpha * (update.state[name] - value)
            for name, value in before.items()
        }
        if all(bool(gradient.isfinite().all()) for gradient in renewed.values()):
            client.method_state["g"] = renewed
        return update

    @property
    def supports_secure_mean(self) -> bool:
        """Yes: h takes the sum of the drifts, and the model their mean."""
        return True

    def aggregate(self, updates: Sequence[Update], round_idx: int) -> None:
        """Renew h and the global model."""
        states = [update.state for update in updates]
        model: StateDict = self.server_state["model"]
        merged: dict[str, Any] = average_state_dicts(states)
        h: dict[str, Tensor] = {}
        for name, value in self.server_state["h"].items():
            # In double precision: the drifts theta_k - theta^t are small, and h is divided by a small alpha.
            before, mean = model[name].double(), merged[name].double()
            drifts = [state[name].to(before) - before for state in states]
            renewed = value.to(before) - self.alpha / self.num_clients * torch.stack(drifts).sum(0)
            h[name] = renewed.to(value.dtype)
            merged[name] = (mean.to(before) - renewed / self.alpha).to(merged[name].dtype)
        self.server_state = {"model": merged, "h": h}

"""Terms of a loss that look at the weights and not at the data."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fedekd.modules.losses.distillation import Record
from fedekd.modules.prediction import ModelOutput


def trainable(network: nn.Module) -> dict[str, Tensor]:
    """Copies of a network's parameters, frozen ones included, by name; its buffers are no part of them."""
    return {name: parameter.detach().clone() for name, parameter in network.named_parameters()}


class ProximalPenalty:
    r"""$\frac{\mu}{2} \|\theta - \theta^t\|^2$: stay near where the round began (FedProx, Ditto).

    Args:
        network: The network that is trained: theta.
        anchor: theta^t by parameter name.
        mu: Weight, at least 0.
    """

    name = "proximal"

    def __init__(self, network: nn.Module, anchor: Mapping[str, Tensor], mu: float) -> None:
        self.network, self.anchor, self.mu = network, anchor, mu

    def __call__(self, student: ModelOutput, teacher: ModelOutput | None, targets: Tensor, record: Record) -> Tensor:
        """The term's value, a scalar."""
        distances = [
            (parameter - self.anchor[name].to(parameter.device)).square().sum()
            for name, parameter in self.network.named_parameters()
        ]
        return 0.5 * self.mu * torch.stack(distances).sum()


class Linear:
    r"""$-\langle g, \theta \rangle$: lean towards a fixed direction (FedDyn).

    Args:
        network: The network that is trained: theta.
        direction: g by parameter name.
    """

    name = "linear"

    def __init__(self, network: nn.Module, direction: Mapping[str, Tensor]) -> None:
        self.network, self.direction = network, direction

    def __call__(self, student: ModelOutput, teacher: ModelOutput | None, targets: Tensor, record: Record) -> Tensor:
        """The term's value, a scalar."""
        products = [
            (self.direction[name].to(parameter.device) * parameter).sum()
            for name, parameter in self.network.named_parameters()
        ]
        return -torch.stack(products).sum()

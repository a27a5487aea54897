"""Penalties on the weights of a network (FedProx, Ditto, FedDyn)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fedekd.modules.losses.base import Record
from fedekd.modules.prediction import ModelOutput


def copy_parameters(network: nn.Module) -> dict[str, Tensor]:
    """Return detached copies of all parameters by name, without buffers."""
    # A shared parameter under each of its names, as in `state_dict`.
    named = network.named_parameters(remove_duplicate=False)
    return {name: parameter.detach().clone() for name, parameter in named}


class ProximalPenalty:
    r"""Proximal term $\frac{\mu}{2} \|\theta - \theta^t\|^2$.

    Args:
        network: Trained network, with parameters theta.
        anchor: theta^t by parameter name.
        mu: Weight, at least 0.

    Reference:
        FedProx (Li et al., MLSys 2020); Ditto (Li et al., ICML 2021).
    """

    name = "proximal"

    def __init__(self, network: nn.Module, anchor: Mapping[str, Tensor], mu: float) -> None:
        self.network, self.anchor, self.mu = network, anchor, mu

    def __call__(self, student: ModelOutput, teacher: ModelOutput | None, targets: Tensor, record: Record) -> Tensor:
        """Compute the term; the batch is not used."""
        distances = [
            (parameter - self.anchor[name].to(parameter.device)).square().sum()
            for name, parameter in self.network.named_parameters()
        ]
        return 0.5 * self.mu * torch.stack(distances).sum()


class LinearPenalty:
    r"""Linear term $-\langle g, \theta \rangle$.

    Args:
        network: Trained network, with parameters theta.
        direction: g by parameter name.

    Reference:
        FedDyn (Acar et al., ICLR 2021).
    """

    name = "linear"

    def __init__(self, network: nn.Module, direction: Mapping[str, Tensor]) -> None:
        self.network, self.direction = network, direction

    def __call__(self, student: ModelOutput, teacher: ModelOutput | None, targets: Tensor, record: Record) -> Tensor:
        """Compute the term; the batch is not used."""
        products = [
            (self.direction[name].to(parameter.device) * parameter).sum()
            for name, parameter in self.network.named_parameters()
        ]
        return -torch.stack(products).sum()

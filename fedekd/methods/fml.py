"""FML: federated mutual learning (Shen et al. 2023), and FedKD's adaptive form of it (Wu et al. 2022)."""

from __future__ import annotations

from typing import Literal

from fedekd.errors import UserError
from fedekd.functional import Aggregator, Mean
from fedekd.methods.base import Update
from fedekd.methods.client import Client
from fedekd.methods.proxies import ProxyMethod
from fedekd.modules.mutual import MutualModule


class FML(ProxyMethod):
    """A private model that stays and a proxy that travels teach each other on every batch; the server averages proxies.

    The nearest relative of FedeKD: the same two networks and the same traffic, but both are trained at once, on
    their labels too, and the proxy is trusted alike for every sample.

    Args:
        private_weight: Weight in [0, 1] of the private model's own L_sup; the rest weighs what the proxy teaches.
        proxy_weight: The same for the proxy.
        weights: uniform counts every client alike, samples by its training samples.
        aggregator: Another way to merge, by class_path; null takes the mean with `weights`.
    """

    adaptive = False

    def __init__(
        self,
        private_weight: float = 0.5,
        proxy_weight: float = 0.5,
        weights: Literal["uniform", "samples"] = "uniform",
        aggregator: Aggregator | None = None,
    ) -> None:
        super().__init__(aggregator if aggregator is not None else Mean(weights))
        for flag, weight in (("private_weight", private_weight), ("proxy_weight", proxy_weight)):
            if not 0 <= weight <= 1:
                raise UserError(f"method.{flag} is {weight}, and must be in [0, 1]")
        self.private_weight, self.proxy_weight = private_weight, proxy_weight

    def prepare_update(self, client: Client, round_idx: int) -> Update:
        """Train both together, and send the proxy."""
        module = MutualModule(
            client.networks["private"],
            client.networks["proxy"],
            client.spec.task,
            self.private_weight,
            self.proxy_weight,
            self.adaptive,
            client.spec.optimizer,
        )
        client.train("private", module, round_idx, carry_optimizer=True)
        self._forget_proxy(client)
        client.supervised_epochs += client.spec.client.local_epochs
        return self.proxy_of(client)

    def _forget_proxy(self, client: Client) -> None:
        """Keep the optimizer's state of the private model alone: averaging will replace the proxy's weights."""
        kept = len(list(client.networks["private"].parameters()))
        state = client.optimizer_states["private"]
        client.optimizer_states["private"] = {
            **state,
            "state": {index: values for index, values in state["state"].items() if index < kept},
        }


class FedKD(FML):
    """FML whose teaching is weighed by how much both models know: L_sup + distillation / (both models' L_sup).

    Of FedKD (Wu et al. 2022) this is the adaptive mutual distillation (its Eq. 1-4); its SVD compression of the
    traffic and its hidden-state loss, which needs transformers, are left out.

    Args:
        weights: uniform counts every client alike, samples by its training samples.
        aggregator: Another way to merge, by class_path; null takes the mean with `weights`.
    """

    adaptive = True

    def __init__(
        self, weights: Literal["uniform", "samples"] = "uniform", aggregator: Aggregator | None = None
    ) -> None:
        super().__init__(weights=weights, aggregator=aggregator)

"""FML (Shen et al., 2023) and FedKD (Wu et al., 2022)."""

from __future__ import annotations

from typing import Literal

from fedekd.errors import require
from fedekd.functional import Aggregator, Mean
from fedekd.methods.base import ClientUpdate, ProxyMethod
from fedekd.methods.client import Client
from fedekd.models.freezing import trained_parameters
from fedekd.modules import MutualModule


class FML(ProxyMethod):
    r"""FML: private model and proxy distil each other; the proxies are averaged.

    $$L = w\,L_{sup} + (1 - w)\,\mathrm{KL}(\text{other} \,\|\, \text{this})$$

    for each of the two models, with its own w. FedeKD has the same two networks and the same traffic; here both are
    trained at the same time and on labels, and the distillation has no gate.

    Args:
        private_weight: w of the private model, in [0, 1].
        proxy_weight: w of the proxy, in [0, 1].
        weights: `uniform`, or `samples` to weight clients by their training samples.
        aggregator: Another aggregator, by class_path; null is the mean with `weights`.

    Raises:
        UserError: If a weight is out of range.

    Reference:
        Shen et al., Federated Mutual Learning, 2023 (arXiv 2006.16765).
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
        require(0 <= private_weight <= 1, "method.private_weight", "a number in [0, 1]", private_weight)
        require(0 <= proxy_weight <= 1, "method.proxy_weight", "a number in [0, 1]", proxy_weight)
        self.private_weight, self.proxy_weight = private_weight, proxy_weight

    def prepare_update(self, client: Client, round_idx: int) -> ClientUpdate:
        """Train both networks together, and return the proxy."""
        module = MutualModule(
            client.networks["private"],
            client.networks["proxy"],
            client.spec.task,
            self.private_weight,
            self.proxy_weight,
            self.adaptive,
            client.spec.optimizer,
        )
        client.train_supervised(module, round_idx, carry_optimizer=True)
        self._drop_proxy_state(client)
        return ClientUpdate.of(client, client.networks["proxy"])

    def _drop_proxy_state(self, client: Client) -> None:
        """Drop the proxy's optimizer state: aggregation replaces its weights."""
        num_private = len(trained_parameters(client.networks["private"]))
        state = client.optimizer_states["private"]
        client.optimizer_states["private"] = {
            **state,
            "state": {index: values for index, values in state["state"].items() if index < num_private},
        }


class FedKD(FML):
    r"""FedKD: FML with distillation weighted by the inverse supervised losses.

    $$L = L_{sup} + \mathrm{KL}(\text{other} \,\|\, \text{this}) / (L_{sup}^{private} + L_{sup}^{proxy})$$

    This is the adaptive mutual distillation of FedKD. Its SVD compression of the traffic, and its hidden-state loss,
    which requires transformers, are not implemented.

    Args:
        weights: `uniform`, or `samples` to weight clients by their training samples.
        aggregator: Another aggregator, by class_path; null is the mean with `weights`.

    Reference:
        Wu et al., Communication-efficient federated learning via knowledge distillation, Nature Communications 2022,
        Eq. 1-4.
    """

    adaptive = True

    def __init__(
        self, weights: Literal["uniform", "samples"] = "uniform", aggregator: Aggregator | None = None
    ) -> None:
        super().__init__(weights=weights, aggregator=aggregator)

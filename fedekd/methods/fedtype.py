"""FedType: proxies and private models that exchange conformal sets (Wang et al., ICML 2024, arXiv 2407.03247)."""

from __future__ import annotations

import torch

from fedekd.errors import UserError
from fedekd.methods.base import StateDict, Update
from fedekd.methods.client import Client
from fedekd.methods.proxies import ProxyMethod
from fedekd.methods.specification import FederationSpec
from fedekd.modules import DistillationLoss, LossTerm, ObjectiveModule, SupervisedLoss
from fedekd.modules.losses.fedtype import ConformalModel, SetRankingLoss, Variant
from fedekd.modules.losses.regularizers import ProximalPenalty, trainable
from fedekd.seeding import derive_seed

#: The regularization of the private model's sets, and what the proxy's begins with.
PRIVATE_LAM, PROXY_LAM = 1.0, 0.5


class FedType(ProxyMethod):
    """In every local epoch the private model learns from the proxy's label sets, then the proxy from the private model.

    Both conformal models are calibrated anew each epoch on the client's whole validation split. For classification.
    The paper leaves open which logits the ranking loss is of (here the private model's), and which accuracy drives
    the proxy's lam (here the proxy's own on the validation split; lam goes on from round to round).

    Args:
        alpha: The sets miss the true label at most this often, in (0, 1).
        mu: Weight of a proximal term on the proxies, at least 0: 0 is FedAvg's aggregation, 0.01 FedProx's.
        variant: paper; or released, the authors' code, in which no gradient of the ranking loss reaches the private
            model: the private models are then Local's, bit for bit.
    """

    training_splits = ("train", "validation")

    def __init__(self, alpha: float = 0.1, mu: float = 0.0, variant: Variant = "paper") -> None:
        super().__init__()
        if not 0 < alpha < 1:
            raise UserError(f"method.alpha is {alpha}, and must be in (0, 1)")
        if not mu >= 0:
            raise UserError(f"method.mu is {mu}, and must be at least 0")
        self.alpha, self.mu, self.variant = alpha, mu, variant

    def init_server(self, spec: FederationSpec) -> None:
        """One initial proxy for all."""
        if spec.task != "classification":
            raise UserError("method FedType is for classification: a regression has no sets of labels")
        super().init_server(spec)

    def init_client(self, client: Client) -> None:
        """A client carries a proxy beside its private model."""
        if not len(client.splits.validation):
            raise UserError(
                f"method FedType calibrates on validation samples, and client {client.number} has none;"
                " raise data.min_samples or the second of data.fractions"
            )
        super().init_client(client)
        client.method_state["lam"] = PROXY_LAM

    def prepare_update(self, client: Client, round_idx: int) -> Update:
        """Train both, a backward and a forward epoch in turn, and send the proxy."""
        anchor = trainable(client.networks["proxy"])
        client.optimizer_states.pop("proxy", None)
        for epoch in range(client.spec.client.local_epochs):
            self._backward_epoch(client, round_idx, epoch)
            self._forward_epoch(client, round_idx, epoch, anchor)
        client.supervised_epochs += client.spec.client.local_epochs
        return self.proxy_of(client)

    def _backward_epoch(self, client: Client, round_idx: int, epoch: int) -> None:
        """The private model: CE + mean_i eta_i l_i, with the frozen proxy's sets."""
        seed = derive_seed(client.spec.seed, client.number, round_idx, "sets", epoch)
        generator = torch.Generator().manual_seed(seed)
        labels = client.images.targets[client.splits.validation.to(client.images.targets.device)]
        models = {
            role: ConformalModel.calibrate(
                client.predict(role, "validation").output, labels, self.alpha, lam, generator
            )
            for role, lam in (("private", PRIVATE_LAM), ("proxy", client.method_state["lam"]))
        }
        reciprocal = SetRankingLoss(models["private"], models["proxy"], self.variant, generator)
        private, proxy = client.networks["private"], client.networks["proxy"]
        objectives: list[LossTerm] = [SupervisedLoss("classification"), reciprocal]
        module = ObjectiveModule(private, objectives, "classification", client.spec.optimizer, teacher=proxy)
        client.train(
            "private",
            module,
            client.supervised_rounds + 1,
            epochs=1,
            first_epoch=epoch,
            teacher_outputs=client.predict("proxy", "train").tensors,
            carry_optimizer=True,
        )

    def _forward_epoch(self, client: Client, round_idx: int, epoch: int, anchor: StateDict) -> None:
        """The proxy: CE + KL(private || proxy), near the global proxy if mu is above 0; then renew its lam."""
        private, proxy = client.networks["private"], client.networks["proxy"]
        before = client.score("validation", "proxy")
        objectives: list[LossTerm] = [SupervisedLoss("classification"), DistillationLoss("classification")]
        if self.mu:
            objectives.append(ProximalPenalty(proxy, anchor, self.mu))
        module = ObjectiveModule(proxy, objectives, "classification", client.spec.optimizer, teacher=private)
        client.train(
            "proxy",
            module,
            round_idx,
            epochs=1,
            first_epoch=epoch,
            teacher_outputs=client.predict("private", "train").tensors,
            carry_optimizer=True,
        )
        change = client.score("validation", "proxy") - before
        lam = client.method_state["lam"]
        if change < 0:  # nor where it is NaN, as a proxy has diverged
            client.method_state["lam"] = lam - (1 - lam) * change

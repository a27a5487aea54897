"""FedType (Wang et al., ICML 2024, arXiv 2407.03247)."""

from __future__ import annotations

from typing import get_args

import torch

from fedekd.errors import require, require_choice
from fedekd.methods.base import ClientUpdate, ProxyMethod, StateDict
from fedekd.methods.client import Client
from fedekd.methods.specification import FederationSpec
from fedekd.modules import DistillationLoss, LossTerm, ObjectiveModule, ProximalPenalty, SupervisedLoss
from fedekd.modules.losses import ConformalModel, SetRankingLoss, copy_parameters, require_nonnegative
from fedekd.modules.losses.fedtype import Variant
from fedekd.seeding import derive_seed

#: RAPS regularisation lam of the private model, and the initial lam of the proxy.
PRIVATE_LAM, PROXY_LAM = 1.0, 0.5


class FedType(ProxyMethod):
    """FedType: private model and proxy exchange conformal prediction sets.

    In every local epoch the private model learns from the labels and from the proxy's prediction sets, then the proxy
    from the labels and from the private model. Both conformal models are recalibrated each epoch on the client's
    validation split. Classification only. The paper leaves two points open. Here the ranking loss uses the logits of
    the private model. The proxy's lam changes with the proxy's score on the validation split, and is kept between
    rounds.

    Args:
        alpha: Miscoverage rate of the prediction sets, in (0, 1).
        mu: Weight of a proximal term on the proxies, at least 0: 0 is aggregation as in FedAvg, 0.01 as in FedProx.
        variant: `paper`; or `released`, the authors' code, in which the ranking loss has no gradient to the private
            model: the private models then equal the local baseline, bit for bit.

    Raises:
        UserError: If a value is out of range.

    Reference:
        Wang et al., Bridging Model Heterogeneity in Federated Learning via Uncertainty-based Asymmetrical Reciprocity
        Learning, ICML 2024.
    """

    training_splits = ("train", "validation")
    required_splits = ("validation",)

    def __init__(self, alpha: float = 0.1, mu: float = 0.0, variant: Variant = "paper") -> None:
        super().__init__()
        require(0 < alpha < 1, "method.alpha", "a number in (0, 1)", alpha)
        require_nonnegative("method.mu", mu)
        require_choice("method.variant", variant, get_args(Variant))
        self.alpha, self.mu, self.variant = alpha, mu, variant

    def init_server(self, spec: FederationSpec) -> None:
        """Check the task, and build the initial proxy."""
        require(spec.task == "classification", "task", "classification for method FedType", spec.task)
        super().init_server(spec)

    def init_client(self, client: Client) -> None:
        """Add the proxy, and set its initial lam."""
        super().init_client(client)
        client.method_state["lam"] = PROXY_LAM

    def prepare_update(self, client: Client, round_idx: int) -> ClientUpdate:
        """Train both networks in alternating epochs, and return the proxy."""
        anchor = copy_parameters(client.networks["proxy"])
        client.optimizer_states.pop("proxy", None)
        # Read before training: counting the last epoch ends the round, which would decay the proxy's learning rate.
        supervised_rounds = client.supervised_rounds
        for epoch in range(client.spec.client.local_epochs):
            self._train_private(client, round_idx, epoch)
            self._train_proxy(client, round_idx, epoch, anchor, supervised_rounds)
        return ClientUpdate.of(client, client.networks["proxy"])

    def _train_private(self, client: Client, round_idx: int, epoch: int) -> None:
        """Train the private model for one epoch on CE + mean_i eta_i l_i."""
        seed = derive_seed(client.spec.seed, client.number, round_idx, "sets", epoch)
        generator = torch.Generator().manual_seed(seed)
        labels = client.samples.targets[client.splits.validation.to(client.samples.targets.device)]
        models = {
            role: ConformalModel.calibrate(
                client.predict(role, "validation").output, labels, self.alpha, lam, generator
            )
            for role, lam in (("private", PRIVATE_LAM), ("proxy", client.method_state["lam"]))
        }
        private, proxy = client.networks["private"], client.networks["proxy"]
        terms: list[LossTerm] = [
            SupervisedLoss("classification"),
            SetRankingLoss(models["private"], models["proxy"], self.variant, generator),
        ]
        client.train_supervised(
            ObjectiveModule(private, terms, "classification", client.spec.optimizer, teacher=proxy),
            epochs=1,
            first_epoch=epoch,
            teacher_outputs=client.teacher_outputs("proxy"),
            carry_optimizer=True,
        )

    def _train_proxy(
        self, client: Client, round_idx: int, epoch: int, anchor: StateDict, supervised_rounds: int
    ) -> None:
        """Train the proxy for one epoch on CE + KL(private || proxy), and update its lam."""
        private, proxy = client.networks["private"], client.networks["proxy"]
        before = client.score("validation", "proxy")
        terms: list[LossTerm] = [SupervisedLoss("classification"), DistillationLoss("classification")]
        if self.mu:
            terms.append(ProximalPenalty(proxy, anchor, self.mu))
        client.train(
            "proxy",
            ObjectiveModule(proxy, terms, "classification", client.spec.optimizer, teacher=private),
            round_idx,
            epochs=1,
            first_epoch=epoch,
            teacher_outputs=client.teacher_outputs("private"),
            carry_optimizer=True,
            decay_rounds=supervised_rounds,
        )
        change = client.score("validation", "proxy") - before
        lam = client.method_state["lam"]
        if change < 0:  # False for NaN, of a proxy that diverged
            client.method_state["lam"] = lam - (1 - lam) * change

"""SAFE-KD (arXiv 2602.03043): a network with exits, distilled. Nothing travels; what is calibrated later may leave."""

from __future__ import annotations

from collections.abc import Sequence

from fedekd.errors import UserError
from fedekd.methods.base import Method, StateDict
from fedekd.methods.client import Client
from fedekd.methods.specification import FederationSpec
from fedekd.modules import MovingAverage, MultiExitModule
from fedekd.modules.losses.exits import require_exit_weights
from fedekd.modules.multi_exit import check_arguments


class SafeKD(Method):
    """Each client trains a network with exits on its own data: CE, DKD from a moving average, deep-to-shallow KL.

    Local is then the same network trained without distillation, on the labels at all exits, with the same weights at
    the start and the same batches. A private model without exits is cut into `client.exits` stages, 3 by default.
    `calibrate` finds, for the finished run, at which confidence images may leave.

    Args:
        distillation_weight: a of the loss (see `fedekd.modules.MultiExitModule`), at least 0.
        consistency_weight: b, at least 0.
        temperature: T, above 0.
        dkd_alpha: DKD's weight of the target's term.
        dkd_beta: DKD's weight of the other classes' term.
        warmup_epochs: DKD's weight rises to a over so many epochs.
        exit_weights: One weight an exit; null weighs all alike.
        ema_decay: Of the moving average that teaches, in [0, 1).
    """

    exits = 3

    def __init__(
        self,
        distillation_weight: float = 1.0,
        consistency_weight: float = 1.0,
        temperature: float = 4.0,
        dkd_alpha: float = 1.0,
        dkd_beta: float = 8.0,
        warmup_epochs: int = 20,
        exit_weights: Sequence[float] | None = None,
        ema_decay: float = 0.999,
    ) -> None:
        super().__init__()
        try:
            check_arguments(
                distillation_weight=distillation_weight,
                consistency_weight=consistency_weight,
                temperature=temperature,
                dkd_alpha=dkd_alpha,
                dkd_beta=dkd_beta,
                warmup_epochs=warmup_epochs,
                ema_decay=ema_decay,
            )
            if exit_weights is not None:
                require_exit_weights(exit_weights, len(exit_weights))
        except UserError as error:
            raise UserError(f"method.{error}") from error
        self.distillation_weight, self.consistency_weight = distillation_weight, consistency_weight
        self.temperature, self.dkd_alpha, self.dkd_beta = temperature, dkd_alpha, dkd_beta
        self.warmup_epochs, self.ema_decay = warmup_epochs, ema_decay
        self.exit_weights = None if exit_weights is None else list(exit_weights)

    def init_server(self, spec: FederationSpec) -> None:
        """There is no server; the task and the number of weights are looked at before anything is trained."""
        if spec.task == "regression":
            raise UserError("method SafeKD distils classes, and the task is regression; use FedeKD or Local")
        if self.exit_weights is not None:
            exits = getattr(spec.build_model("private", "server"), "num_exits", 1)
            if len(self.exit_weights) != exits:
                raise UserError(
                    f"method.exit_weights has {len(self.exit_weights)} numbers, and the network has {exits} exits"
                )

    def init_client(self, client: Client) -> None:
        """The teacher begins as a copy of the network."""
        if self.distillation_weight:
            client.networks["teacher"] = MovingAverage(client.networks["private"], self.ema_decay)

    def receive(self, client: Client, received: StateDict, round_idx: int) -> dict[str, float]:
        """Train for `local_epochs`."""
        if round_idx == 0:
            return {}
        average = client.networks.get("teacher")
        assert average is None or isinstance(average, MovingAverage)
        module = MultiExitModule(
            client.networks["private"],
            average if average is not None else "ema",
            distillation_weight=self.distillation_weight,
            consistency_weight=self.consistency_weight,
            temperature=self.temperature,
            dkd_alpha=self.dkd_alpha,
            dkd_beta=self.dkd_beta,
            warmup_epochs=self.warmup_epochs,
            exit_weights=self.exit_weights,
            ema_decay=self.ema_decay,
            optimizer=client.spec.optimizer,
            first_epoch=client.supervised_epochs,
        )
        logs = client.train("private", module, client.supervised_rounds + 1, carry_optimizer=True)
        client.supervised_epochs += client.spec.client.local_epochs
        return logs

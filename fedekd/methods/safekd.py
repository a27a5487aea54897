"""SAFE-KD (arXiv 2602.03043)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fedekd.errors import UserError, require
from fedekd.methods.base import Method, StateDict
from fedekd.methods.client import Client
from fedekd.methods.specification import FederationSpec
from fedekd.methods.teacher import ExternalTeacher
from fedekd.modules import MovingAverage, MultiExitModule
from fedekd.modules.losses import require_exit_weights
from fedekd.modules.multi_exit import check_arguments


class SafeKD(Method):
    """SAFE-KD: clients train networks with exits by distillation, without exchange.

    The loss is cross-entropy, decoupled distillation (DKD) from a teacher, and KL from the deepest to the shallow exits
    (see `fedekd.modules.MultiExitModule`). The teacher is a moving average of the network, or another trained network.
    The local baseline is the same network trained without distillation, on the labels at all exits, with the same
    initial weights and batches. For the finished run, `calibrate` selects the confidence thresholds of the exits.

    Args:
        distillation_weight: a, weight of DKD, at least 0.
        consistency_weight: b, weight of the distillation from the deepest exit, at least 0.
        temperature: T of both distillations, above 0.
        dkd_alpha: Weight of DKD's target term, at least 0.
        dkd_beta: Weight of DKD's non-target term, at least 0.
        warmup_epochs: Epochs over which the weight of DKD rises to a, at least 0.
        exit_weights: One weight per exit, at least 0; null weights all E exits by 1 / E.
        ema_decay: Decay of the moving average, in [0, 1).
        teacher: A trained, frozen network in place of the moving average: class_path and init_args as for
            client.private_model, and weights, the path of a file with its state_dict or of fedekd export --format
            safetensors. Without weights the network must have trained weights when it is built. Its last exit teaches
            all exits. Every process and site needs the file under this path; null for the moving average.

    Raises:
        UserError: If a value is out of range, or the file of the teacher cannot be read.

    Reference:
        SAFE-KD, arXiv 2602.03043.
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
        teacher: dict[str, Any] | None = None,
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
        is_used = teacher is None or distillation_weight > 0
        require(is_used, "method.teacher", "null with distillation_weight 0", teacher)
        self.teacher = None if teacher is None else ExternalTeacher.from_config(teacher)

    def init_server(self, spec: FederationSpec) -> None:
        """Check the task, the number of exit weights and the external teacher."""
        require(
            spec.task != "regression",
            "task",
            "classification for method SafeKD",
            spec.task,
            "Use FedeKD or Local.",
        )
        if self.exit_weights is not None:
            for number in {spec.architecture_key(number): number for number in range(spec.num_clients)}.values():
                exits = getattr(spec.build_model("private", number), "num_exits", 1)
                expected = f"{exits} weights, one per exit of client {number}"
                require(len(self.exit_weights) == exits, "method.exit_weights", expected, self.exit_weights)
        if self.teacher is not None:
            self.teacher.check(spec)

    def init_client(self, client: Client) -> None:
        """Add the moving average, which starts as a copy of the network."""
        if self.distillation_weight and self.teacher is None:
            client.networks["teacher"] = MovingAverage(client.networks["private"], self.ema_decay)

    def receive(self, client: Client, received: StateDict, round_idx: int) -> dict[str, float]:
        """Train the private model for `local_epochs`."""
        if round_idx == 0:
            return {}
        # Built per phase: the memory of a process then holds one external teacher, not one per client.
        external = None if self.teacher is None else self.teacher.build(client.spec)
        teacher = client.networks.get("teacher") if external is None else external
        module = MultiExitModule(
            client.networks["private"],
            teacher if teacher is not None else "ema",
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
        outputs = () if external is None else client.teacher_outputs(external)
        return client.train_supervised(module, carry_optimizer=True, teacher_outputs=outputs)

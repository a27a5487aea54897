"""FedeKD (arXiv 2605.05553)."""

from __future__ import annotations

import math
from importlib import import_module
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from fedekd.errors import UserError, require, require_choice
from fedekd.functional import Aggregator, active_exits
from fedekd.functional.exit_scheduling import SCHEDULES, Schedule
from fedekd.methods.base import ClientUpdate, ProxyMethod, StateDict
from fedekd.methods.client import Client
from fedekd.methods.specification import FederationSpec
from fedekd.modules import ENERGIES, Energy, GatedPrivateModule, ProxyDistillModule
from fedekd.modules.energies import Source
from fedekd.modules.losses import Gate

OptimizerState = Literal["carry", "reset"]


def _import_energy(class_path: str) -> Energy:
    """Create an energy from its class path, as in package.module.MyEnergy.

    Raises:
        UserError: If there is no such energy, or its constructor requires arguments.
    """
    module, _, name = class_path.rpartition(".")
    if not module:
        require_choice("method.energy", class_path, ENERGIES)
    try:
        energy_class = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise UserError(f"method.energy: expected an importable class, got {class_path!r}. {error}") from error
    require(
        isinstance(energy_class, type) and issubclass(energy_class, Energy),
        "method.energy",
        "a subclass of fedekd.modules.Energy",
        class_path,
    )
    try:
        energy: Energy = energy_class()
    except TypeError as error:
        raise UserError(
            f"method.energy: expected a class without required arguments, got {class_path!r}. Give its init_args:"
            f" {error}"
        ) from error
    return energy


class FedeKD(ProxyMethod):
    r"""FedeKD: federated distillation through proxies, gated per sample.

    In each round a client (1) trains its private model on labels and on the gated distillation from the global proxy,

    $$L = L_{sup} + \lambda_{kd} \cdot \frac1n \sum_i w_i\, \mathrm{KL}(q_i \,\|\, p_i),
    \qquad w_i = \frac{1}{1 + \exp(\beta \tilde E_i)} \quad \text{(Eq. 3-5)}$$

    with p the private, q the proxy's prediction and $\tilde E_i$ the energy normalised within the batch, and (2)
    distils the private model into its copy of the proxy, which it sends. The server averages the proxies (Algorithm 1).

    Args:
        beta: Sharpness of the gate, above 0 (Eq. 3).
        lambda_kd: Weight of the gated distillation, at least 0 (Eq. 5); with 0 the private models equal the local
            baseline.
        energy: `kl` (Eq. 1; Eq. 2 for regression), `entropy`, `margin`, `logsumexp` (Eq. 6-8), `feature` (Eq. 9), or
            the class path of a fedekd.modules.Energy.
        gate: `energy` (Eq. 3); `none` has weight 1 for every sample; `shuffled` permutes the weights within the batch.
        energy_of: Network whose logits `entropy`, `margin` and `logsumexp` use: `proxy` or `private`.
        temperature: Temperature of the distillation into the proxy, above 0.
        proxy_epochs: Epochs of the distillation into the proxy, at least 1; null is client.local_epochs.
        private_optimizer_state: `carry` the optimizer state of the private model from round to round, or `reset` it.
        proxy_optimizer_state: `reset` by default, because aggregation replaces the proxy's weights.
        aggregator: Another aggregator of the proxies, by class_path; null is the uniform mean (Algorithm 1, line 7).
        schedule: For a private model with exits: `all_on`, or `progressive`, which trains the deepest exit from the
            first round on and adds the others, shallow ones first, over the first half of the rounds.
        consistency_weight: For a private model with exits: weight of the distillation from its deepest exit to the
            others, at least 0.

    Raises:
        UserError: If a value is out of range.

    Reference:
        FedeKD, arXiv 2605.05553, Algorithm 1.
    """

    def __init__(
        self,
        beta: float = 1.0,
        lambda_kd: float = 1.0,
        energy: str | Energy = "kl",
        gate: Gate = "energy",
        energy_of: Source = "proxy",
        temperature: float = 1.0,
        proxy_epochs: int | None = None,
        private_optimizer_state: OptimizerState = "carry",
        proxy_optimizer_state: OptimizerState = "reset",
        aggregator: Aggregator | None = None,
        schedule: Schedule = "all_on",
        consistency_weight: float = 0.0,
    ) -> None:
        super().__init__(aggregator)
        require_choice("method.schedule", schedule, SCHEDULES)
        require(consistency_weight >= 0, "method.consistency_weight", "at least 0", consistency_weight)
        require(0 < beta < math.inf, "method.beta", "a finite number above 0", beta)
        require(lambda_kd >= 0, "method.lambda_kd", "at least 0", lambda_kd)
        require(0 < temperature < math.inf, "method.temperature", "a finite number above 0", temperature)
        require(proxy_epochs is None or proxy_epochs >= 1, "method.proxy_epochs", "at least 1, or null", proxy_epochs)
        require_choice("method.private_optimizer_state", private_optimizer_state, get_args(OptimizerState))
        require_choice("method.proxy_optimizer_state", proxy_optimizer_state, get_args(OptimizerState))
        if isinstance(energy, str) and energy not in ENERGIES:
            energy = _import_energy(energy)
        self.beta, self.lambda_kd, self.energy = beta, lambda_kd, energy
        self.gate, self.energy_of = gate, energy_of
        self.temperature, self.proxy_epochs = temperature, proxy_epochs
        self.schedule, self.consistency_weight = schedule, consistency_weight
        self.carry_private = private_optimizer_state == "carry"
        self.carry_proxy = proxy_optimizer_state == "carry"

    def init_server(self, spec: FederationSpec) -> None:
        """Build the initial proxy, and check the options on each architecture.

        Raises:
            UserError: If an option does not fit the task or the networks.
        """
        super().init_server(spec)
        proxy = spec.build_model("proxy", "server")
        for number in {spec.architecture_key(number): number for number in range(spec.num_clients)}.values():
            private = spec.build_model("private", number)
            self._private_module(spec, private, proxy, self.lambda_kd)
            self._proxy_module(spec, private, proxy)

    def receive(self, client: Client, received: StateDict, round_idx: int) -> dict[str, float]:
        """Load the proxy, and train the private model with it as teacher (lines 9-17)."""
        private, proxy = client.networks["private"], client.networks["proxy"]
        super().receive(client, received, round_idx)
        if round_idx == 0:
            return {}
        lambda_kd, active = self.lambda_kd, self._active_exits(client, round_idx)
        if lambda_kd and self.is_untrained(client, received):
            lambda_kd = 0.0  # without a teacher the phase is that of the local baseline
        module = self._private_module(client.spec, private, proxy, lambda_kd, active)
        teacher_outputs: tuple[Tensor, ...] = ()
        if lambda_kd:
            # The proxy is frozen during the phase: one forward pass per sample, not one per epoch.
            teacher_outputs = client.teacher_outputs("proxy", module.with_features)
            if not all(bool(output.isfinite().all()) for output in teacher_outputs):
                # A broken teacher counts as none.
                module, teacher_outputs = self._private_module(client.spec, private, proxy, 0.0, active), ()
        return client.train_supervised(module, teacher_outputs=teacher_outputs, carry_optimizer=self.carry_private)

    def _active_exits(self, client: Client, round_idx: int) -> list[bool] | None:
        """Return which exits are trained in a round; None is all of them.

        Updates of heads cannot be compared across architectures, so only the budget of the schedule is used.
        """
        exits = getattr(client.networks["private"], "num_exits", 1)
        if self.schedule == "all_on" or exits == 1:
            return None
        rounds = client.spec.rounds
        active: list[bool] = active_exits(torch.eye(1), round_idx, rounds, exits, schedule=self.schedule)[0].tolist()
        return active

    def prepare_update(self, client: Client, round_idx: int) -> ClientUpdate:
        """Distil the private model into the proxy (lines 2-5), and return the proxy."""
        private, proxy = client.networks["private"], client.networks["proxy"]
        client.train(
            "proxy",
            self._proxy_module(client.spec, private, proxy),
            round_idx,
            epochs=self.proxy_epochs,
            teacher_outputs=client.teacher_outputs("private"),
            carry_optimizer=self.carry_proxy,
        )
        return ClientUpdate.of(client, proxy)

    def _private_module(
        self,
        spec: FederationSpec,
        private: nn.Module,
        proxy: nn.Module,
        lambda_kd: float,
        active: list[bool] | None = None,
    ) -> GatedPrivateModule:
        return GatedPrivateModule(
            private,
            proxy,
            spec.task,
            energy=self.energy,
            beta=self.beta,
            lambda_kd=lambda_kd,
            optimizer=spec.optimizer,
            gate=self.gate,
            energy_of=self.energy_of,
            active=active,
            consistency_weight=self.consistency_weight,
        )

    def _proxy_module(self, spec: FederationSpec, private: nn.Module, proxy: nn.Module) -> ProxyDistillModule:
        return ProxyDistillModule(proxy, private, spec.task, self.temperature, spec.optimizer)

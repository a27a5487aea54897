"""FedeKD: federated distillation through proxies, gated by energy (arXiv 2605.05553, Algorithm 1)."""

from __future__ import annotations

import math
from importlib import import_module
from typing import Literal, get_args

import torch
from torch import nn

from fedekd.errors import UserError, nearest
from fedekd.functional import Aggregator, active_exits
from fedekd.functional.exit_scheduling import SCHEDULES, Schedule
from fedekd.methods.base import StateDict, Update
from fedekd.methods.client import Client
from fedekd.methods.proxies import ProxyMethod
from fedekd.methods.specification import FederationSpec
from fedekd.modules import ENERGIES, Energy, GatedPrivateModule, ProxyDistillModule
from fedekd.modules.energies import Source
from fedekd.modules.losses.distillation import Gate

OptimizerState = Literal["carry", "reset"]


def _imported(energy: str) -> Energy:
    """An energy by its class path, as in package.module.MyEnergy.

    Raises:
        UserError: If there is no such energy, or it needs arguments.
    """
    module, _, name = energy.rpartition(".")
    if not module:
        raise UserError(f"method.energy is {energy!r}, which is not known; {nearest(energy, ENERGIES)}")
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise UserError(f"method.energy is {energy!r}, which cannot be imported: {error}") from error
    if not (isinstance(found, type) and issubclass(found, Energy)):
        raise UserError(f"method.energy is {energy!r}, which is no fedekd.modules.Energy")
    try:
        return found()
    except TypeError as error:
        raise UserError(f"method.energy is {energy!r}, which needs init_args beside its class_path: {error}") from error


class FedeKD(ProxyMethod):
    """Proxies travel, private models stay, and a gate decides sample by sample how far the global proxy is trusted.

    Args:
        beta: Sharpness of the gate (Eq. 3), above 0.
        lambda_kd: Weight of the gated distillation (Eq. 5), at least 0; with 0 the private models are Local's.
        energy: kl (Eq. 1; for regression Eq. 2), entropy, margin, logsumexp (Eq. 6-8), feature (Eq. 9), or the
            class path of an Energy.
        gate: energy (Eq. 3); none trusts every sample fully; shuffled permutes the weights within the batch.
        energy_of: Whose logits entropy, margin and logsumexp look at: proxy or private.
        temperature: Temperature of the forward distillation, above 0.
        proxy_epochs: Epochs of the forward distillation; null takes client.local_epochs.
        private_optimizer_state: carry it from round to round, or reset it.
        proxy_optimizer_state: reset by default, since averaging replaces the proxy's weights.
        aggregator: Another way to merge the proxies, by class_path; null takes the uniform mean (line 7).
        schedule: Of a private model with exits: all_on, or progressive, which lets the deepest exit learn from the
            first round on, and the others, the shallow ones first, over the first half of the rounds.
        consistency_weight: Of a private model with exits: how much the shallow ones learn from the deepest, at least 0.
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
        if schedule not in SCHEDULES:
            raise UserError(f"method.schedule is {schedule!r}, which is not known; {nearest(schedule, SCHEDULES)}")
        if not consistency_weight >= 0:
            raise UserError(f"method.consistency_weight is {consistency_weight}, and must be at least 0")
        if not 0 < beta < math.inf:
            raise UserError(f"method.beta is {beta}, and must be a finite number above 0")
        if isinstance(energy, str) and energy not in ENERGIES:
            energy = _imported(energy)
        if not lambda_kd >= 0:
            raise UserError(f"method.lambda_kd is {lambda_kd}, and must be at least 0")
        if not 0 < temperature < math.inf:
            raise UserError(f"method.temperature is {temperature}, and must be a finite number above 0")
        if proxy_epochs is not None and proxy_epochs < 1:
            raise UserError(f"method.proxy_epochs is {proxy_epochs}, and must be at least 1, or null")
        for name, state in (("private", private_optimizer_state), ("proxy", proxy_optimizer_state)):
            if state not in get_args(OptimizerState):
                hint = nearest(state, get_args(OptimizerState))
                raise UserError(f"method.{name}_optimizer_state is {state!r}, which is not known; {hint}")
        self.beta, self.lambda_kd, self.energy, self.gate, self.energy_of = (
            beta,
            lambda_kd,
            energy,
            gate,
            energy_of,
        )
        self.temperature, self.proxy_epochs = temperature, proxy_epochs
        self.schedule, self.consistency_weight = schedule, consistency_weight
        self.carry_private = private_optimizer_state == "carry"
        self.carry_proxy = proxy_optimizer_state == "carry"

    def init_server(self, spec: FederationSpec) -> None:
        """One initial proxy for all, and a look whether the modules can be made: of one client of each kind.

        Raises:
            UserError: If an option does not fit the task or the networks; nobody has trained yet.
        """
        super().init_server(spec)
        proxy = spec.build_model("proxy", "server")
        for owner in {spec.architecture_key(number): number for number in range(spec.num_clients)}.values():
            private = spec.build_model("private", owner)
            self._backward(spec, private, proxy, self.lambda_kd)
            self._forward(spec, private, proxy)

    def receive(self, client: Client, received: StateDict, round_idx: int) -> dict[str, float]:
        """The backward stage (lines 9-17): the private model learns from labels and from the global proxy."""
        private, proxy = client.networks["private"], client.networks["proxy"]
        super().receive(client, received, round_idx)
        if round_idx == 0:
            return {}
        lambda_kd = 0.0 if self._is_untrained(client, received) else self.lambda_kd
        module = self._backward(client.spec, private, proxy, lambda_kd, self._active(client, round_idx))
        # The proxy is frozen for the whole phase: it is asked once for every sample, not once an epoch.
        teacher_outputs = client.predict("proxy", "train", module.with_features).tensors if lambda_kd else ()
        logs = client.train(
            "private",
            module,
            client.supervised_rounds + 1,
            teacher_outputs=teacher_outputs,
            carry_optimizer=self.carry_private,
        )
        client.supervised_epochs += client.spec.client.local_epochs
        return logs

    def _active(self, client: Client, round_idx: int) -> list[bool] | None:
        """Which exits learn in a round; None is all of them.

        Networks of unlike architecture have no updates of heads to compare: every client goes by the budget alone.
        """
        exits = getattr(client.networks["private"], "num_exits", 1)
        if self.schedule == "all_on" or exits == 1:
            return None
        rounds = client.spec.rounds
        active: list[bool] = active_exits(torch.eye(1), round_idx, rounds, exits, schedule=self.schedule)[0].tolist()
        return active

    def _is_untrained(self, client: Client, received: StateDict) -> bool:
        """Whether the global proxy is still the initial one, because no round has met its quorum yet."""
        initial = client.spec.build_model("proxy", "server").state_dict()
        return all(torch.equal(initial[name], value.to(initial[name].device)) for name, value in received.items())

    def prepare_update(self, client: Client, round_idx: int) -> Update:
        """The forward stage (lines 2-5): the proxy learns to answer as the private model does, and is sent."""
        private, proxy = client.networks["private"], client.networks["proxy"]
        module = self._forward(client.spec, private, proxy)
        teacher_outputs = client.predict("private", "train").tensors
        client.train(
            "proxy",
            module,
            round_idx,
            epochs=self.proxy_epochs,
            teacher_outputs=teacher_outputs,
            carry_optimizer=self.carry_proxy,
        )
        return self.proxy_of(client)

    def _backward(
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

    def _forward(self, spec: FederationSpec, private: nn.Module, proxy: nn.Module) -> ProxyDistillModule:
        return ProxyDistillModule(proxy, private, spec.task, self.temperature, spec.optimizer)
